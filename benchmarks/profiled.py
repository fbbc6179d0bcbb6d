"""Where the time of a piece of work goes, by kind of operation: torch's own profiler, summed up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"),
    "attention": ("scaled_dot_product", "flash_attention", "softmax"),
    "copies": ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::cat", "aten::fill_", "aten::zero_"),
    "optimiser": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
}
"""Operations by the start, or a part, of their names; what computes and is none of them is elementwise."""
VIEWS = ("view", "reshape", "transpose", "aten::t", "linear", "matmul", "expand", "slice", "detach", "empty", "select")
"""What computes nothing itself."""


def operations(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the CPU by kind, ``dispatch`` being what is in no kernel, and the number of ``operations``.

    The profiler itself takes time, of dispatch most.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    spent = dict.fromkeys((*KINDS, "elementwise", "dispatch"), 0.0)
    count = 0
    for event in seen.key_averages():
        spent[_kind(event.key)] += event.self_cpu_time_total / 1000
        count += event.count * event.key.startswith("aten::")
    return {**spent, "operations": count}


def told(found: Mapping[str, float]) -> str:
    """:func:`operations` in words."""
    parts = [f"{kind} {spent:.1f}" for kind, spent in found.items() if kind != "operations"]
    return f"{', '.join(parts)} ms, {found['operations']:.0f} operations"


def _kind(name: str) -> str:
    for kind, parts in KINDS.items():
        if name in parts or any(part in name for part in parts if "::" not in part):
            return kind
    return "dispatch" if not name.startswith("aten::") or any(view in name for view in VIEWS) else "elementwise"
