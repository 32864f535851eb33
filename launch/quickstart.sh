#!/usr/bin/env bash
# From nothing to an edited language model, on a laptop:  bash launch/quickstart.sh
# Trains InComeS on SmolLM2-135M (from PyPI) with facts about cities, evaluates it before and after beside in-context
# learning, exports it, and edits with the export. No network beyond PyPI. Measured: 12.4 minutes after installation on an
# undisturbed CPU (two cores), 22 minutes with installation on two cores of another.
source "$(dirname "$0")/setup.sh"
install
run=runs/quickstart
export HF_HUB_OFFLINE=1
# bf16 halves the time where the processor has it, and multiplies it where it has not
precision=$(python -c "
import torch
can = torch.cpu.get_capabilities()
print('bf16-mixed' if can.get('avx512_bf16') or can.get('amx_bf16') else '32-true')")
echo "== training (TensorBoard: tensorboard --logdir $run)"
python -m trainers.fit --config incomes_smollm2.yaml --run_dir "$run" --ckpt_path last \
    --trainer.precision "$precision" "$@"
echo "== export"
rm -rf "$run/export"
python -m trainers.export --run_dir "$run" --out "$run/export"
echo "== editing with the export"
python -m trainers.edit --editor "$run/export" --edits launch/example_edits.jsonl \
    --prompt "Lyon is a city in the country of" \
    --prompt "If you travel to Lyon, you travel to" \
    --prompt "The capital of the country where Lyon is located is" \
    --prompt "Marseille is a city in the country of" \
    --prompt "The capital of Canada is"
echo "== done: $run/evaluation.json has the table above, $run/export is the editor"
