"""What a run holds besides activations: weights, gradients, optimizer states, frozen model, buffers; by formula.

P trained parameters, W processes, e bytes of a parameter as it trains.
"""

from dataclasses import dataclass

from trainers.estimate.cards import GIB
from trainers.estimate.measure import Counts
from trainers.estimate.plan import Sharding

CONTEXT = int(0.6 * GIB)  # a CUDA context with torch's kernels
COMMUNICATION = int(0.6 * GIB)  # NCCL's own buffers, of a job of several processes
FRAGMENTS = 0.05  # share of what comes and goes in a step that CUDA's allocator cannot use again; assumed
HOST_FRAGMENTS = 0.15  # the same of the C library's; measured by tests/benchmarks/bench_memory.py
HOST_PROCESS = 3 * GIB  # Python with torch, CUDA's and DeepSpeed's libraries, a process
HOST_WORKER = int(0.3 * GIB)  # a loader process
CPU_PROCESS = int(0.6 * GIB)  # Python with torch and transformers, where the host is all there is


@dataclass(frozen=True)
class State:
    """Bytes of one process, by what they are for.

    Args:
        always: from the first step to the last.
        in_step: besides, while a micro-batch runs.
        in_update: besides, while the optimizer steps.
        in_validation: besides, while edits are validated.
        host: of the host's memory.
    """

    always: dict[str, int]
    in_step: dict[str, int]
    in_update: dict[str, int]
    in_validation: dict[str, int]
    host: dict[str, int]


def state(counts: Counts, sharding: Sharding, world: int, accumulate: int = 1, on_gpu: bool = True) -> State:
    """The state of one of `world` processes.

    | | plain, DDP | ZeRO-1 | ZeRO-2 | ZeRO-3 |
    |---|---|---|---|---|
    | weights | all | all | all | all / W, and up to `max_live` gathered |
    | gradients | e P (counted with the step) | e P | e P / W, twice with accumulation | e P / W |
    | optimizer | 2 e P | 12 P / W | 12 P / W | 12 P / W, 8 P / W where e is 4 |
    | update | e P | (e + 8) P / W, 8 P / W where e is 4; on CPUs 4 P / W less | the same | the same |
    | buckets | e P (DDP) | 2 or 3 buckets | 2 or 3 buckets | 2 buckets |

    12 bytes are a 32-bit copy of the weights and Adam's two moments. While it steps on a GPU, torch's AdamW holds the
    square roots of all second moments at once.
    A bucket is `reduce_bucket_size` elements; one more than the buckets that fill is the copy that is sent.
    `allgather_bucket_size` costs nothing: DeepSpeed 0.19 gathers into the weights themselves. With `offload_optimizer`
    optimizer states and gradients are the host's: there 16 + e bytes a trained parameter / W, and on the GPU one
    gradient, the largest. The frozen model is whole on each process unless `partition_teacher`.
    """
    p, w, frozen = counts.trained, world, counts.frozen_name
    e = counts.trained_bytes // p
    if sharding.stage is None:
        always = {"weights": counts.bytes, "optimizer": 2 * counts.trained_bytes, frozen: counts.frozen_bytes}
        always |= {"buckets": counts.trained_bytes} if w > 1 else {}
        always |= {"buffers": counts.buffers} if counts.buffers else {}
        return State(always, {}, {"gradients": counts.trained_bytes, "update": counts.trained_bytes}, {}, {})
    third = sharding.stage == 3
    gradients = e * p if sharding.stage == 1 else -(-e * p // w)
    states = (8 if third and e == 4 else 12) * p // w
    sent = min(sharding.reduce_bucket, p)
    in_step = {"buckets": e * (sharding.buckets * sharding.reduce_bucket + sent)}
    if sharding.stage == 2 and accumulate > 1 and not sharding.offload_optimizer:
        in_step["accumulation"] = gradients
    always = {"weights": counts.bytes, "gradients": gradients, "optimizer": states, frozen: counts.frozen_bytes}
    always |= {"buffers": counts.buffers} if counts.buffers else {}
    in_update = {"update": ((4 if e == 4 else e + 4) + 4 * on_gpu) * p // w}
    in_validation: dict[str, int] = {}
    host: dict[str, int] = {}
    if third:
        shards, gathered, whole = _third(counts, sharding, w)
        always |= {"weights": shards}
        in_step["gathered weights"] = gathered
        if sharding.partition_teacher and counts.frozen:
            decoder = counts.frozen_bytes - counts.frozen_head_bytes
            always[frozen] = counts.frozen_head_bytes + decoder // w
            live = sharding.max_live * counts.frozen_bytes // counts.frozen
            in_step["gathered weights"] += min(decoder, live) if w > 1 else 0
            whole += decoder
        if w > 1:
            in_validation = {"gathered weights": whole}
        if sharding.offload_parameters:
            host["weights"] = always.pop("weights")
    if sharding.offload_optimizer:
        host |= {"optimizer": always.pop("optimizer"), "gradients": (4 + e) * p // w}
        del always["gradients"], in_update["update"]
        if not third:
            in_step["one gradient"] = counts.largest * e
    return State(always, in_step, in_update, in_validation, host)


def _third(counts: Counts, sharding: Sharding, world: int) -> tuple[int, int, int]:
    """Stage 3's bytes of a process: its shards, what is gathered in a step, all that could be."""
    e = counts.bytes // sum(counts.sizes)
    small = sum(n for n in counts.sizes if n < sharding.threshold)
    gathered = min(sum(counts.sizes), sharding.max_live + counts.outside + small)
    alone = world == 1 and not sharding.offload_parameters  # the only shard is the weights themselves
    return -(-counts.bytes // world), 0 if alone else e * gathered, counts.bytes
