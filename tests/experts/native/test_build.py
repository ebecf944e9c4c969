"""What is compiled once, and what is said where it cannot be."""

from __future__ import annotations

import pytest

from experts.kernels.native.kernel import NativeKernel
from experts.kernels.native.library import SOURCE
from experts.native import build
from tests.support.kernel_cases import BASE

needs_compiler = pytest.mark.skipif(NativeKernel.supports(BASE) is not None, reason=str(NativeKernel.supports(BASE)))


@needs_compiler
def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    first = build.build_library(SOURCE)
    stamp = first.stat().st_mtime_ns
    monkeypatch.setattr(build, "compile_source", lambda *_: pytest.fail("compiled again"))
    assert build.build_library(SOURCE) == first
    assert first.stat().st_mtime_ns == stamp


@needs_compiler
def test_a_changed_header_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    header.write_text("#define ANSWER 1\n")
    first = build.build_library(source)
    header.write_text("#define ANSWER 2\n")
    assert build.build_library(source) != first


def test_no_compiler_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.NativeBuildError, match=r"no C\+\+ compiler"):
        build.build_library(SOURCE)


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.NativeBuildError, match="no such target"):
        build.build_library(SOURCE)
