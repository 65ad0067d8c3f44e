"""The emulator itself: small kernels, each with one thing wrong, and what must be said of it."""

from __future__ import annotations

import pytest
import torch
from cuda.core._kernel_arg_handler import ParamHolder
from emulator import EmulationError, Emulator

# name: threads, body, what the message says. Each is given an input and an output of 64 floats.
KERNELS = {
    "right": (64, "store_global(out + i, load_global(in + i));", None),
    "reads_behind": (64, "store_global(out + i, load_global(in + i + 1));", "outside every tensor"),
    "reads_before": (64, "store_global(out + i, load_global(in + i - 1));", "outside every tensor"),
    "writes_behind": (64, "store_global(out + i + 1, 0.f);", "write of 4 bytes outside"),
    "writes_twice": (64, "store_global(out + i / 2, 0.f);", "written a second time"),
    "writes_half": (64, "if (i % 2) store_global(out + i, 0.f);", "128 bytes of out never written"),
    "writes_input": (64, "store_global((float*)in + i, 0.f);", "write to in, an input"),
    "reads_output": (64, "store_global(out + i, load_global(out + i));", "read of out, an output"),
    "misaligned": (64, "load_global_16((const f16*)(in + 1));", "misaligned global address"),
    "shared_behind": (64, "store_shared(s + 4 * i + 4, 0.f);", "of 256 bytes of shared memory"),
    "shared_before": (64, "store_shared(s + 4 * i - 4, 0.f);", "of 256 bytes of shared memory"),
    "shared_misaligned": (64, "store_shared(s + 4 * i + 2, 0.f);", "misaligned offset"),
    "shared_unwritten": (64, "load_shared<float>(s + 4 * i);", "that nobody wrote"),
    "race_read": (
        64,
        "store_shared(s + 4 * i, 0.f); load_shared<float>(s + 4 * (63 - i));",
        "race: |nobody wrote",
    ),
    "race_write": (64, "store_shared(s + 4 * (i / 2), 0.f);", "race: write"),
    "race_of_warps": (
        64,
        "store_shared(s + 4 * i, 0.f); warp_barrier(); load_shared<float>(s + 4 * (63 - i));",
        "race: |nobody wrote",
    ),
    "race_after_read": (
        64,
        "store_shared(s + 4 * i, 0.f); block_barrier(); load_shared<float>(s + 4 * (63 - i));"
        "store_shared(s + 4 * i, 0.f);",
        "race: write|race: read",
    ),
    "warp_barrier_is_enough": (
        32,
        "store_shared(s + 4 * i, 0.f); warp_barrier();"
        "store_global(out + i, load_shared<float>(s + 4 * (31 - i)));"
        "store_global(out + 32 + i, 0.f);",
        None,
    ),
    "diverging": (64, "if (i % 2) warp_barrier(); else quad_sum(0.f);", "lanes of a warp diverge"),
    "one_lane_leaves": (64, "if (i) warp_barrier();", "deadlock"),
    "one_warp_leaves": (64, "if (i < 32) block_barrier();", "deadlock"),
}


@pytest.fixture(scope="module")
def machine() -> Emulator:
    kernels = "\n".join(
        f"KERNEL({name}, {threads}, 1, (const float* in, float* out), "
        f"SHARED_MEMORY(s, 256); const int i = thread_index(); (void)s; (void)i; {body})"
        for name, (threads, body, _) in KERNELS.items()
    )
    return Emulator(kernels, {}, "-Og")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("order", range(3))
def test_what_the_emulator_says(name: str, order: int, machine: Emulator) -> None:
    threads, _, message = KERNELS[name]
    # Far apart in one allocation, so that a step outside one is not a step into the other.
    memory = torch.zeros(1024)
    given, result = memory[256:320], memory[640:704]
    machine.library.emulator_clear_views()
    machine.view("in", given, 0)
    machine.view("out", result, 1)
    holder = ParamHolder([given.data_ptr(), result.data_ptr()])

    def launch() -> None:
        machine.run_packed(name, (1, 1), threads, holder, 2, seed=order)

    if message is None:
        launch()
    else:
        with pytest.raises(EmulationError, match=message):
            launch()


def test_a_launch_unlike_the_declaration_is_refused(machine: Emulator) -> None:
    holder = ParamHolder([0, 0])
    with pytest.raises(EmulationError, match="no such kernel"):
        machine.run_packed("absent", (1, 1), 64, holder, 2)
    with pytest.raises(EmulationError, match="another number of threads"):
        machine.run_packed("right", (1, 1), 32, holder, 2)
    with pytest.raises(EmulationError, match="another number of parameters"):
        machine.run_packed("right", (1, 1), 64, holder, 3)
