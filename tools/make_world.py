"""Make the embedded default: a small world, its instructions, and a model of it.

    python tools/make_world.py --out src/flocktune/assets/world [--quick | --public-only]

Everything follows from the seed. Rows and tokenizer take seconds; pretraining
takes about 8 minutes of one core's time (it took 19 by the clock on a machine
busy with other work). --quick trains for a few steps only, to try the script; --public-only makes the
public rows anew and leaves the clients' rows, the tokenizer and the model alone.
The weights made on another machine may differ in the last bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from world import lexicon
from world.facts import World, build_world
from world.instructions import Row, instruction_rows, prompt_key, public_rows
from world.pretrain import Plan, pretrain
from world.text import documents
from world.tokenizer import TEMPLATE_WORDS, WORD, save_tokenizer, split_words, train_tokenizer

SEED = 7
VOCABULARY_SIZE = 2048
TOKENIZER_DOCUMENTS = 20_000
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def instruction_words(rows: list[Row]) -> list[str]:
    """The words of prompts that are not names or things: text must show them too."""
    known = set(lexicon.RESIDENTS + lexicon.VISITORS + lexicon.TOWNS + lexicon.RIVERS)
    known |= set(lexicon.KIND_OF) | set(lexicon.JOBS)
    words = {word for row in rows for word in WORD.findall(row["instruction"])}
    return [*sorted(words - known | set(TEMPLATE_WORDS)), "?"]


def world_words(rows: list[Row], texts: list[str]) -> set[str]:
    """Every word that occurs in prompts, responses, or text."""
    parts = [row[key] for row in rows for key in ("instruction", "context", "response")]
    return {word for part in (*parts, *texts) for word in WORD.findall(part)}


def make_tokenizer(world: World, rows: list[Row], seed: int) -> Tokenizer:
    """The tokenizer of text and instructions; ValueError if it splits a word of theirs."""
    rng = random.Random(f"tokenizer {seed}")
    texts = list(islice(documents(world, instruction_words(rows), rng), TOKENIZER_DOCUMENTS))
    texts += [f"{row['instruction']}\n{row['context']}\n{row['response']}" for row in rows]
    tokenizer = train_tokenizer(texts, VOCABULARY_SIZE)
    require_single_tokens(tokenizer, world_words(rows, texts))
    return tokenizer


def require_single_tokens(tokenizer: Tokenizer, words: set[str]) -> None:
    """ValueError naming the words that are more than one token, if any are."""
    if torn := split_words(tokenizer, words):
        raise ValueError(f"{len(torn)} words are not single tokens: {' '.join(torn)}")


def make_public(world: World, rows: list[Row], tokenizer: Tokenizer, seed: int) -> list[Row]:
    """The public rows, of which no client holds one.

    The tokenizer is not trained on them, so that they can change without it (and the model) changing.
    """
    public = public_rows(world, seed, rows)
    if shared := {prompt_key(row) for row in rows} & {prompt_key(row) for row in public}:
        raise ValueError(f"{len(shared)} public prompts are those of clients")
    require_single_tokens(tokenizer, world_words(public, []))
    return public


def write_rows(rows: list[Row], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def file_digests(folder: Path) -> dict[str, dict[str, object]]:
    """Size and SHA-256 of each file of the assets but the manifest itself."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def write_manifest(out: Path, facts: dict[str, object]) -> None:
    """What was made, from what, how well, and the digests of the files."""
    manifest = facts | {"files": file_digests(out)}
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")


def make(out: Path, plan: Plan, seed: int) -> None:
    """Write all assets into the folder."""
    began = time.monotonic()
    (out / "model").mkdir(parents=True, exist_ok=True)
    world = build_world(seed)
    rows = instruction_rows(world, seed)
    write_rows(rows, out / "instructions.jsonl")
    tokenizer = make_tokenizer(world, rows, seed)
    save_tokenizer(tokenizer, out / "model", plan.context_length)
    public = make_public(world, rows, tokenizer, seed)
    write_rows(public, out / "public.jsonl")
    print(f"{len(rows)} rows, {len(public)} public rows, {tokenizer.get_vocab_size()} tokens", flush=True)
    model, loss = pretrain(world, instruction_words(rows), tokenizer, plan, seed)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    (out / "model" / "model.safetensors").chmod(0o644)  # saved readable by its owner only
    write_manifest(
        out,
        {
            "seed": seed,
            "rows": len(rows),
            "public_rows": len(public),
            "vocabulary": tokenizer.get_vocab_size(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "plan": asdict(plan),
            "tokens_trained_on": plan.steps * plan.rows * plan.row_tokens,
            "held_out_loss_nats": round(loss, 4),
            "minutes": round((time.monotonic() - began) / 60, 1),
            "libraries": {name: version(name) for name in LIBRARIES},
        },
    )
    print(f"held-out loss {loss:.4f} nats a token; written to {out}")


def renew_public(out: Path) -> None:
    """Write only the public rows, of the seed, rows and tokenizer that are in the folder."""
    facts = json.loads((out / "MANIFEST.json").read_text())
    rows = [json.loads(line) for line in (out / "instructions.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.from_file(str(out / "model" / "tokenizer.json"))
    public = make_public(build_world(facts["seed"]), rows, tokenizer, facts["seed"])
    write_rows(public, out / "public.jsonl")
    write_manifest(out, facts | {"public_rows": len(public)})
    print(f"{len(public)} public rows; written to {out}")


def main() -> None:
    """Read the command line and make the world."""
    parser = argparse.ArgumentParser(description="Make the embedded world and its model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the assets")
    parser.add_argument("--seed", type=int, default=SEED, help=f"default {SEED}")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--quick", action="store_true", help="only 20 steps of pretraining")
    less.add_argument("--public-only", action="store_true", help="only the public rows, of the seed in MANIFEST.json")
    arguments = parser.parse_args()
    if arguments.public_only:
        renew_public(arguments.out)
        return
    torch.set_num_threads(1)
    plan = replace(Plan(), steps=20) if arguments.quick else Plan()
    make(arguments.out, plan, arguments.seed)


if __name__ == "__main__":
    main()
