"""How fast a whole training step is, at the shape of a real model with random weights, and how much memory it takes.

    python tests/benchmarks/bench_training.py --shape qwen7b --train lora --gpu h200
    python tests/benchmarks/bench_training.py --shape llama1b --train full --gpu h200 --liger false
    python tests/benchmarks/bench_training.py --shape qwen7b --train full --gpu h200 --layer zero3_offload.yaml
    python tests/benchmarks/bench_training.py --shape tiny --train full --gpu cpu        # that the benchmark works

It trains by incomes_<shape>.yaml, of which it changes where weights come from, the data (made-up records of texts as
long as the paper has, about 244 tokens of edit and query) and the records of a micro-batch. It prints a row of a table:
tokens/s of the job, peak memory of a GPU beside the dry run's estimate, and model-FLOPs utilisation: the student's two
passes and the teacher's forward pass, what checkpointing repeats counted once.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {  # config, type, shape as in the model's own config.json
    "qwen7b": (
        "incomes_qwen7b",
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
    ),
    "llama1b": (
        "incomes_llama1b",
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": ("incomes_tiny", "llama", {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}),
}
EDIT, QUERY = 110, 130  # characters, which are tokens of the byte tokenizer


def records(count: int) -> list[dict[str, Any]]:
    """Made-up records, of which the edit has EDIT characters and each query QUERY."""
    draw = random.Random(0)

    def words(length: int) -> str:
        return "".join(draw.choice("abcdefghij klmno pqrst ") for _ in range(length))

    found = []
    for i in range(count):
        subject, target = f"Thing {i}", words(10).strip() or "x"
        near = {"prompt": words(QUERY - 10), "answers": [words(9)]}
        found.append(
            {
                "id": f"made/{i}",
                "requests": [{"prompt": f"{subject} {words(EDIT - 25)} is", "target": target, "subject": subject}],
                "rephrases": [{"prompt": f"{words(QUERY - 30)} {subject} is", "answers": [target]}],
                "locality": {"near": [near]},
                "portability": {},
                "multi_hop": [],
                "domain": "",
            }
        )
    return found


def arguments(given: argparse.Namespace, folder: Path) -> list[str]:
    """Those of trainers.fit: the config with other weights and data, written anew."""
    name, kind, shape = SHAPES[given.shape]
    data = folder / "records.jsonl"
    made = records(given.records * given.gpus * (given.steps + 2))
    data.write_text("\n".join(json.dumps(record) for record in made), encoding="utf-8")
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    model, batches, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    dtype = model["backbone"].get("dtype", "float32")
    model["backbone"] = {"source": f"random:{kind}", "overrides": shape, "dtype": dtype, "liger": given.liger == "true"}
    model |= {"train": given.train, "calibration_records": 0}
    source = [{"format": "records", "path": str(data)}]
    batches |= {"train": source, "val": source, "test": source, "num_workers": 0}
    batches |= {"records_per_batch": given.records, "pool_sizes": [given.records], "pool_rates": [1.0]}
    batches |= {"val_records": given.gpus, "val_pool": 1}
    trainer |= {"accelerator": "cpu" if given.gpu == "cpu" else "gpu", "devices": given.gpus, "max_steps": given.steps}
    trainer |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1}
    trainer["callbacks"] = [{"class_path": "trainers.callbacks.Throughput"}]
    config |= {"run_dir": str(folder / "run"), "checkpoint": {"at_end": False}}
    made_config = folder / "config.yaml"
    made_config.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [f"--config={layer}" for layer in (made_config, *given.layer)]


def estimated(args: list[str], given: argparse.Namespace) -> tuple[int, float | None]:
    """Bytes that the dry run expects, and the share of the card's peak that one useful token a second is."""
    from trainers.estimate import estimate, named
    from trainers.estimate.command import parsed
    from trainers.estimate.totals import estimate_plan

    found = estimate(parsed(args), given.gpus, named(given.gpu))
    once = estimate_plan(found.plan.altered(gradient_checkpointing=False)).flops
    peak = found.plan.card.flops
    return found.total, once / peak / given.gpus if peak else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--train", choices=["full", "upper", "lora"], default="full")
    parser.add_argument("--gpu", default="cpu", help="a card that `trainers.estimate` knows, or cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--liger", choices=["true", "false"], default="true")
    parser.add_argument("--layer", action="append", default=[], help="a config on top, such as zero3_offload.yaml")
    parser.add_argument("--records", type=int, default=16, help="of a micro-batch on one GPU")
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(given, Path(folder))
        subprocess.run([sys.executable, "-m", "trainers.fit", *args], cwd=ROOT, check=True)
        seen = scalars(Path(folder) / "run")
        expected, share = estimated(args, given)
    speed = seen["train/tokens_per_second"][-1]
    peak = max(seen["train/memory_gib"])
    mfu = f"{100 * speed * share:.1f}%" if share else "unknown"
    liger = given.liger if torch.cuda.is_available() else "off (no CUDA)"
    print(
        "| shape | train | layers | Liger | records | tokens/s | peak GiB | estimated GiB | MFU |\n"
        "|---|---|---|---|---:|---:|---:|---:|---:|\n"
        f"| {given.shape} | {given.train} | {' '.join(given.layer) or '-'} | {liger} | {given.records} | {speed:,.0f} "
        f"| {peak:.1f} | {expected / 2**30:.1f} | {mfu} |"
    )


def scalars(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard's files of a run hold, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [e.value for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


if __name__ == "__main__":
    main()
