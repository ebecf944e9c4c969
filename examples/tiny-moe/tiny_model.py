"""A small Qwen3-MoE for training on a CPU: tokens sorted by expert, one matrix product per expert.

Shapes: B sequences, S positions, T = B*S tokens, D model width, H query heads, G key/value heads, d head width,
E experts, K experts per token, F expert width, N = T*K pairs of token and choice, P slots (the pairs sorted by expert,
padded to blocks), I and O the input and output width of a linear map.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64


@dataclass(frozen=True)
class TinyMoeConfig:
    """Sizes of the model, named as in transformers' `Qwen3MoeConfig`."""

    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return asdict(self)


class GroupedLinear(torch.autograd.Function):
    """`y_PO[i] = x_PI[i] @ weight_EIO[e]` for rows sorted by expert, `counts` rows each; products written in place."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EIO)
        ctx.counts = counts
        y_PO = x_PI.new_empty(x_PI.shape[0], weight_EIO.shape[2])
        start = 0
        for expert, count in enumerate(counts):
            torch.mm(x_PI[start : start + count], weight_EIO[expert], out=y_PO[start : start + count])
            start += count
        return y_PO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_PI, weight_EIO = ctx.saved_tensors
        grad_PO = grads[0].contiguous()
        dx_PI, dweight_EIO = torch.empty_like(x_PI), torch.empty_like(weight_EIO)
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            torch.mm(grad_PO[rows], weight_EIO[expert].t(), out=dx_PI[rows])
            torch.mm(x_PI[rows].t(), grad_PO[rows], out=dweight_EIO[expert])
            start += count
        return dx_PI, dweight_EIO, None


def padded_order(flat_N: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Slots of the (token, choice) pairs when sorted by expert, with every expert's rows padded to whole blocks.

    Whole blocks keep the set of matrix shapes small; the CPU library generates code for each shape.

    Returns:
        The pair in each slot [P] (pair 0 in empty slots), 1.0 for filled slots [P], the slot of each pair [N], and the
        number of slots of each expert.
    """
    padded_E = (counts_E + BLOCK - 1) // BLOCK * BLOCK
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    order_N = flat_N.argsort(stable=True)
    slots = torch.arange(order_N.numel(), device=flat_N.device) + shift_E[flat_N[order_N]]
    counts = padded_E.tolist()
    source_P = torch.zeros(sum(counts), dtype=torch.long, device=flat_N.device)
    real_P = torch.zeros(sum(counts), device=flat_N.device)
    source_P[slots], real_P[slots] = order_N, 1.0
    slot_N = torch.empty_like(order_N)
    slot_N[order_N] = slots
    return source_P, real_P, slot_N, counts


def sum_choices(x_ND: Tensor, top_k: int) -> Tensor:
    """Sum the K rows of each token, [T*K, D] to [T, D]; K-1 additions are faster than reducing a short axis."""
    choices = x_ND.view(-1, top_k, x_ND.shape[1]).unbind(1)
    total = choices[0]
    for choice in choices[1:]:
        total = total + choice
    return total


class Gather(torch.autograd.Function):
    """Copies token rows to their slots. The backward pass sums each token's K rows without an indexed add."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_P: Tensor, slot_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot_N)
        ctx.top_k = top_k
        return x_TD.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot_N,) = ctx.saved_tensors
        return sum_choices(grads[0].index_select(0, slot_N), ctx.top_k), None, None, None


class Combine(torch.autograd.Function):
    """Sums each token's K rows from their slots."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, token_P: Tensor, slot_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(token_P)
        return sum_choices(y_PD.index_select(0, slot_N), top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (token_P,) = ctx.saved_tensors
        return grads[0].index_select(0, token_P), None, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm; computes in the dtype of its input and returns `dtype`."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalize the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps).to(dtype)


def causal_attention(q_BHSd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor) -> Tensor:
    """Softmax attention. On a CPU, short sequences use two plain products, which are faster than the fused kernel."""
    B, H, S, d = q_BHSd.shape
    if q_BHSd.device.type != "cpu" or S > 256:
        return F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, is_causal=True)
    q, k, v = (x_BHSd.reshape(B * H, S, d) for x_BHSd in (q_BHSd, k_BHSd, v_BHSd))
    hidden_SS = torch.full((S, S), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(hidden_SS, q, k.transpose(1, 2), alpha=d**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, S, d)


class Attention(nn.Module):
    """Causal attention with normalized queries and keys and rotary positions."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config, D, d = config, config.hidden_size, config.head_dim
        self.q_proj = nn.Parameter(torch.empty(config.num_attention_heads * d, D))
        self.k_proj = nn.Parameter(torch.empty(config.num_key_value_heads * d, D))
        self.v_proj = nn.Parameter(torch.empty(config.num_key_value_heads * d, D))
        self.o_proj = nn.Parameter(torch.empty(D, config.num_attention_heads * d))
        self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)

    def forward(self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D] in the dtype of `x_BSD`."""
        B, S, _ = x_BSD.shape
        H, G, d, dtype = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
            x_BSD.dtype,
        )
        weight = torch.cat([self.q_proj, self.k_proj, self.v_proj]).to(dtype)
        q, k, v = F.linear(x_BSD, weight).view(B, S, H + 2 * G, d).split([H, G, G], dim=2)

        def rotate(x_BSnd: Tensor, norm: RMSNorm) -> Tensor:
            x_BSnd = norm(x_BSnd, dtype)
            first, second = x_BSnd.chunk(2, dim=-1)
            return (x_BSnd * cos_Sd[:, None] + torch.cat([-second, first], dim=-1) * sin_Sd[:, None]).transpose(1, 2)

        k_BHSd = rotate(k, self.k_norm).repeat_interleave(H // G, dim=1)
        v_BHSd = v.transpose(1, 2).repeat_interleave(H // G, dim=1)
        out = causal_attention(rotate(q, self.q_norm), k_BHSd, v_BHSd)
        return F.linear(out.transpose(1, 2).reshape(B, S, H * d), self.o_proj.to(dtype))


def weighted_swiglu(gate_up_P2F: Tensor, weights_P1: Tensor) -> Tensor:
    """The experts' activation times each row's routing weight, which is cheaper here than after the second product."""
    gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
    return F.silu(gate_PF) * up_PF * weights_P1


class SparseMoe(nn.Module):
    """Softmax gate, top-k with weights that sum to one, SwiGLU experts."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        D, E, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Parameter(torch.empty(E, D))
        self.gate_up = nn.Parameter(torch.empty(E, D, 2 * width))
        self.down = nn.Parameter(torch.empty(E, width, D))

    def forward(self, x_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """fp32 [T, D] to ([T, D] of `dtype`, the layer's load-balancing loss, 1.0 for even loads)."""
        E = self.gate.shape[0]
        probs_TE = F.linear(x_TD, self.gate).softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        flat_N = ids_TK.flatten()
        counts_E = torch.bincount(flat_N, minlength=E)
        source_P, real_P, slot_N, counts = padded_order(flat_N, counts_E)

        x_PD = Gather.apply(x_TD.to(dtype), source_P // self.top_k, slot_N, self.top_k)
        gate_up_P2F = GroupedLinear.apply(x_PD, self.gate_up.to(dtype), counts)
        weights_P1 = (weights_TK.flatten().index_select(0, source_P) * real_P).to(dtype).unsqueeze(1)
        y_PD = GroupedLinear.apply(weighted_swiglu(gate_up_P2F, weights_P1), self.down.to(dtype), counts)
        balance = E * (counts_E / flat_N.numel() * probs_TE.mean(0)).sum()
        return Combine.apply(y_PD, source_P // self.top_k, slot_N, self.top_k), balance


class Layer(nn.Module):
    """Attention and experts, each after a norm, on an fp32 residual stream."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoe(config)

    def forward(self, x_BSD: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> tuple[Tensor, Tensor]:
        """One layer and its load-balancing loss."""
        dtype = cos_Sd.dtype
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD, dtype), cos_Sd, sin_Sd)
        normed_TD = self.post_attention_layernorm(x_BSD, torch.float32).flatten(0, 1)
        y_TD, balance = self.mlp(normed_TD, dtype)
        return x_BSD + y_TD.view_as(x_BSD), balance


class TinyMoe(nn.Module):
    """The whole model, with tied embeddings. Weights are fp32; matrix products are computed in `dtype`."""

    def __init__(self, config: TinyMoeConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                deep = name.endswith(("o_proj", "down"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if deep else 0.02)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids_BS: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats per token, and the mean load-balancing loss of the layers."""
        S = ids_BS.shape[1]
        cos_Sd, sin_Sd = self.cos[:S].to(self.dtype), self.sin[:S].to(self.dtype)
        x_BSD = F.embedding(ids_BS, self.embed_tokens)
        balances = []
        for layer in self.layers:
            x_BSD, balance = layer(x_BSD, cos_Sd, sin_Sd)
            balances.append(balance)
        return self.head_loss(x_BSD, targets_BS), torch.stack(balances).mean()

    def head_loss(self, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean cross-entropy of the tied output layer."""
        logits = F.linear(self.norm(x_BSD, self.dtype), self.embed_tokens.to(self.dtype)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets_BS.flatten())
