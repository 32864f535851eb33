#!/usr/bin/env bash
# Trains under torchrun, on one machine or many; the arguments are those of `python -m trainers.fit`:
#
#   bash launch/torchrun.sh --config incomes_qwen7b.yaml                     # all GPUs of this machine
#   bash launch/torchrun.sh --config incomes_qwen7b.yaml --ckpt_path last    # goes on after an interruption
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-host bash launch/torchrun.sh ...  # on each of two machines, NODE_RANK 0 and 1
#
# Environment:
#   GPUS_PER_NODE  processes of each machine (default: its GPUs; 1 where there is none)
#   NNODES         machines (default 1), NODE_RANK which of them this is (default 0)
#   MASTER_ADDR    the host with NODE_RANK 0, MASTER_PORT a free port there (default 29500): for several machines
#
# SIGTERM or SIGUSR1, to this process on any of the machines: all ranks finish the optimizer step and save a checkpoint,
# and it ends with exit code 143. Nothing is restarted; run the same command with --ckpt_path last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi

nodes=${NNODES:-1}
gpus=${GPUS_PER_NODE:-$(python -c "import torch; print(torch.cuda.device_count() or 1)")}
if [ "$nodes" -eq 1 ]; then
    meet=(--standalone --local-addr 127.0.0.1)
else
    : "${MASTER_ADDR:?set it to the name or address of the machine with NODE_RANK 0}"
    meet=(--node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

# torchrun gives each process one thread, with which a step that is offloaded to the host takes minutes
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c "import os, sys; print(max(1, len(os.sched_getaffinity(0)) // int(sys.argv[1])))" "$gpus")}"

# torchrun itself gives its processes 30 seconds after a signal, and ends with 1 whatever they ended with. The first of
# them that ends is the end of the others, but none ends with 143 before all have seen the checkpoint whole.
torchrun='
import signal, sys
import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

def pass_on(number, frame):
    for rank in psutil.Process().children():
        rank.send_signal(number)

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, pass_on)
try:
    main()
except ChildFailedError as error:
    codes = {failure.exitcode for failure in error.failures.values()}
    sys.exit(143 if 143 in codes else str(error))
'
exec python -c "$torchrun" --nnodes "$nodes" --nproc-per-node "$gpus" "${meet[@]}" \
    --max-restarts 0 --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    -m trainers.fit "$@" --trainer.num_nodes "$nodes" --trainer.devices "$gpus"
