"""Compile vLLM's unified attention for an H100, on any machine, and print how it multiplies two tiles.

Printed as JSON: the tensor-core instructions of the kernel in float32 as ``import_vllm`` leaves the environment, and
without the variable that it sets. It runs in a process of its own: where vLLM finds no GPU it puts a placeholder in
place of Triton, and this file puts Triton back.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from rrhf_bench.sampling.vllm import import_vllm

# A model of 14 query heads and 2 of keys, of size 64, without any of the kernel's options.
CONSTANTS: dict[str, Any] = {
    "num_query_heads": 14, "num_queries_per_kv": 7, "BLOCK_SIZE": 16, "TILE_SIZE": 32, "HEAD_SIZE": 64,
    "HEAD_SIZE_PADDED": 64, "SLIDING_WINDOW": 0, "USE_CAUSAL": True, "MAX_MM_RANGES": 0, "R_SWA_WINDOW": 0,
    "stride_k_cache_3": 1, "stride_v_cache_3": 1, "BLOCK_Q": 2, "BLOCK_M": 16, "NUM_SEGMENTS_PER_SEQ": 16,
    "IS_3D": False, "KV_QUANT_MODE": 0, "FP8_MIN": -448.0, "FP8_MAX": 448.0, "CHUNK_LOOKBACK": -1, "CHUNK_SIZE": -1,
    "Q_IS_FP8": False, "MM_PREFIX_CLAMP_SW": False,
}  # fmt: skip
# Options that are off, and what only they read.
ABSENT = re.compile(
    r"USE_\w+|(sink|alibi_slopes|qq_bias|per_seq_causal|mm_prefix_range|segm_\w+|[kv]_scale_cache)_ptr"
    r"|[qkv]_scale|stride_[kv]s_\w+"
)
TENSORS = ("output_ptr", "query_ptr", "key_cache_ptr", "value_cache_ptr")


def unified_attention() -> Any:
    """The kernel of the installed vLLM, made by Triton itself."""
    import triton
    import triton.language as tl
    import vllm.triton_utils

    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
    for name in [name for name in sys.modules if name.startswith("vllm.v1.attention.ops.triton_")]:
        del sys.modules[name]  # made with the placeholder
    from vllm.v1.attention.ops.triton_unified_attention import kernel_unified_attention

    return kernel_unified_attention


def products(kernel: Any) -> list[str]:
    """Return the tensor-core instructions of the kernel in float32, compiled for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in CONSTANTS or ABSENT.fullmatch(name):
            signature[name] = "constexpr"
            constants[(i,)] = CONSTANTS.get(name, False if name.startswith("USE_") else None)
        elif name in TENSORS:
            signature[name] = "*fp32"
        else:
            signature[name] = "*i32" if name.endswith("_ptr") else "i32" if name == "num_seqs" else "i64"
    signature |= dict.fromkeys(("scale", "out_scale", "softcap"), "fp32")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "fma.rn.f32" in text, "no product at all: the kernel is not what this file takes it for"
    return sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\.\S+", text)))


if __name__ == "__main__":
    import_vllm()
    kernel = unified_attention()
    found = {"ours": products(kernel)}
    del os.environ["TRITON_F32_DEFAULT"]
    found["without"] = products(kernel)
    print(json.dumps(found))
