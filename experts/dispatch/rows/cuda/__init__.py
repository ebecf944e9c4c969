"""Rows on a GPU, moved by compiled code from the wait for the routing to the message that is sent.

`programs.cu` packs and combines, `driver` compiles it and knows CUDA's driver, `mover` joins both to native/device.h.
"""
