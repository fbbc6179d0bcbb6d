"""A model card: README.md of an exported adapter or model, ready for a hub but for what only its owner can say.

Counts, settings and scores only: no text of a row, no name of a client or of a category, no path of this machine.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flocktune.config.load import to_tree
from flocktune.config.names import EMBEDDED
from flocktune.config.privacy_rules import privacy_in_force
from flocktune.config.schema import CustomTemplate, FlowerEngine, RunConfig
from flocktune.report.runs import Experiment
from flocktune.report.summaries import Summary, datasets, is_baseline, method_label, number, travelled
from flocktune.report.tables import comparison_markdown, format_bytes

OWNER = "**To be filled in by the owner:**"
_SHARED = (
    "method", "seed", "rounds", "model", "lora", "data", "allocation", "scheduling", "local", "aggregation", "privacy",
    "emulator", "alignment", "compression", "personal", "secure_aggregation", "evaluation",
)  # fmt: skip
"""Sections of a recipe that name no client, no machine and no file of a gate or an attack."""


@dataclass(frozen=True)
class Export:
    """What was exported. ``base``: a hub id, or None; ``chat_template``: whether the tokenizer beside it carries one.

    ``rank`` is that of the written factors; ``max_lora_rank`` what vLLM is told, None where it takes no such adapter.
    """

    key: str
    config: RunConfig
    base: str | None
    merged: bool
    chat_template: bool
    rank: int
    max_lora_rank: int | None


def model_card(export: Export, experiment: Experiment) -> str:
    """The card, Markdown with YAML front matter."""
    config = export.config
    runs = experiment.methods.get(export.key) or []
    start = runs[0].start if runs else {}
    summary = experiment.summaries.get(export.key) or {}
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(export), sort_keys=False, allow_unicode=True)}"
        "# license: to be filled in by the owner; the base model's licence binds too\n---\n",
        f"# {config.name}\n",
        f"{_what(export)}\n",
        f"## Intended use and limits\n\n{OWNER} what it is for, who may use it, what it must not be used for, in which "
        "languages, and the licence.\n\n" + _limits(config),
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data(config, start, export.key)) + "\n",
        "## Training\n\n" + _table(_training(export, start, summary)),
        "## Privacy\n\n" + "\n".join(f"- {line}" for line in _privacy(export, summary, start)) + "\n",
        "## Results\n\n" + _results(export, experiment),
        "## Use\n\n" + _use(export),
        "## Versions\n\n" + _table(sorted((start.get("versions") or {}).items())),
    ]
    return "\n".join(parts)


def shared_recipe(config: RunConfig) -> str:
    """The recipe as YAML without anything that tells of this machine or of clients: paths become ``a-local-path``."""
    tree = to_tree(config)
    return "# Local paths, clients' names and settings of machines were left out.\n" + yaml.safe_dump(
        {key: _without_paths(tree[key]) for key in _SHARED if tree[key] is not None}, sort_keys=False
    )


_DATA_FILE = r"\.(json|jsonl|csv|parquet|ya?ml|txt)$"
_LOCAL = re.compile(rf"[/\\~]|{_DATA_FILE}")


def hub_id(name: str) -> str | None:
    """``name`` when it is a hub's ``owner/name`` and no file or folder here; a data set's ``:split`` is left off."""
    plain = name.partition(":")[0]
    parts = plain.split("/")
    looks = len(parts) == 2 and all(part and part[0] not in ".~" and "\\" not in part for part in parts)
    return None if not looks or Path(plain).exists() or re.search(_DATA_FILE, plain) else plain


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key: inner if key.startswith(("with_", "without_")) else _without_paths(inner)
            for key, inner in value.items()
            if not (key == "clients" and isinstance(inner, list | tuple))  # their names
        }
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and _LOCAL.search(value) and not hub_id(value):
        return "a-local-path"
    return value


def _front_matter(export: Export) -> dict[str, Any]:
    config = export.config
    found: dict[str, Any] = {}
    if export.base:
        found |= {"base_model": export.base, "base_model_relation": "finetune" if export.merged else "adapter"}
    found |= {"library_name": "transformers" if export.merged else "peft", "pipeline_tag": "text-generation"}
    if data := [name for name in [hub_id(config.data.train)] if name]:
        found["datasets"] = data
    tags = ["flocktune", config.method, "lora"]
    if not is_baseline(export.key):
        tags.insert(0, "federated-learning")
    if privacy_in_force(config):
        tags.append("differential-privacy")
    return {**found, "tags": tags}


def _what(export: Export) -> str:
    kind = "A language model with its adapter merged in" if export.merged else "A LoRA adapter"
    base = f"[{export.base}](https://huggingface.co/{export.base})" if export.base else None
    base = base or ("flocktune's embedded example model" if export.config.model.path == EMBEDDED else "a local model")
    how = {
        "fedit": "tuned by FedIT ([arXiv 2305.05644](https://arxiv.org/abs/2305.05644)): clients trained it on rows of "
        "their own, and only adapters travelled",
        "fedbiot": "tuned by FedBiOT ([arXiv 2406.17706](https://arxiv.org/abs/2406.17706)): clients trained it on an "
        "emulator of the model and on rows of their own, and only adapters travelled",
        "local": "tuned on the rows of one client alone, as a baseline",
        "centralised": "tuned on all rows in one place, as a baseline",
        "base": "not tuned, as a baseline",
    }[export.config.method]
    known = export.base or export.config.model.path == EMBEDDED
    owner = "" if known else f"\n\n{OWNER} where the base model comes from."
    return f"{kind} for {base}, {how}. Made with flocktune.{owner}"


def _limits(config: RunConfig) -> str:
    return (
        f"It was tuned on prompts of at most {config.data.max_tokens} tokens with answers, in one template, and "
        "evaluated on held-out rows of the same data only. Nothing was done against false, biased or harmful "
        "answers. A tuned model can repeat what it was trained on (see Privacy).\n"
    )


def _data(config: RunConfig, start: Mapping[str, Any], key: str) -> Iterator[str]:
    name = hub_id(config.data.train)
    if name:
        yield f"Rows of [{name}](https://huggingface.co/datasets/{name})."
    elif config.data.train.startswith(EMBEDDED):
        yield "flocktune's embedded example data, of an invented world."
    else:
        yield f"{OWNER} what the rows are, where they come from, and on what ground they may be used."
    clients = start.get("clients") or {}
    rows = sorted(int(number(client.get("rows")) or 0) for client in clients.values())
    if rows:
        yield (
            f"{sum(rows):,} rows of {len(rows)} clients: "
            f"{rows[0]:,} to {rows[-1]:,} each, median {statistics.median_low(rows):,}."
        )
    if categories := {name for client in clients.values() for name in client.get("categories") or {}}:
        yield f"Categories of rows: {len(categories)}; their names are not told here."
    if is_baseline(key) and key.startswith("local"):
        yield "Of these clients one trained."
    held_out = sum(int(number(count) or 0) for count in (start.get("test") or {}).values())
    if held_out:
        yield f"{held_out:,} rows were held out for evaluation and never trained on."


def _training(export: Export, start: Mapping[str, Any], summary: Summary) -> Iterator[tuple[str, Any]]:
    config = export.config
    yield "method", method_label(config.method)
    yield "rounds", summary.get("rounds", config.rounds)
    local = config.local
    yield "local training", f"{local.steps} steps" if local.steps else f"{local.epochs} epochs"
    yield "batch", f"{local.batch_size} rows" + (f" x {local.accumulate}" if local.accumulate > 1 else "")
    yield "optimiser", f"{local.optimizer}, learning rate {local.lr:g}, {local.schedule}"
    if not is_baseline(export.key):
        chosen = to_tree(config.scheduling.selection)
        share = f", {100 * chosen['fraction']:g} %" if "fraction" in chosen else ""
        yield "clients a round", chosen["kind"] + share
        yield "aggregation", config.aggregation.rule
    lora = config.lora
    scaling = "rsLoRA" if lora.rslora else "LoRA"
    yield "adapter", f"{scaling}, rank {export.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(_short(lora.targets))
    yield "on", targets
    if count := number(start.get("trainable_parameters") or summary.get("trainable_parameters")):
        yield "trained parameters", f"{count:,.0f}"
    if isinstance(emulator := start.get("emulator"), Mapping):
        share = 100 * emulator["parameters"] / emulator["full_parameters"]
        yield "emulator", f"{emulator['layers']} of {emulator['full_layers']} layers, {share:.0f} % of the parameters"
    template = config.data.template
    yield "prompt template", "its own" if isinstance(template, CustomTemplate) else template
    for said, name in (("sent by all clients", "bytes_up"), ("received by all clients", "bytes_down"),
                       ("emulators handed out", "bytes_emulator")):  # fmt: skip
        if size := travelled(export.key, summary, name):
            yield said, format_bytes(size)


def _short(targets: tuple[str, ...]) -> list[str]:
    """Endings of modules; of whole paths (FedBiOT) their last parts."""
    return sorted({target.rpartition(".")[2] for target in targets})


def _privacy(export: Export, summary: Summary, start: Mapping[str, Any]) -> Iterator[str]:
    config = export.config
    if is_baseline(export.key):
        yield "Differential privacy: none. Secure aggregation: none. This is a baseline."
        return
    told = summary.get("privacy")
    settings = privacy_in_force(config)
    if settings and isinstance(told, Mapping):
        unit = "a row" if to_tree(settings)["kind"] == "sample" else "a client with all its rows"
        yield (
            f"Differential privacy of {unit}: epsilon {number(told.get('epsilon')) or 0:.3g} at delta "
            f"{number(told.get('delta')) or 0:g} ({told.get('accountant', 'accounted')}; {told.get('said', '')})."
        )
    else:
        yield "Differential privacy: none. What clients sent, and this result, may tell of their rows."
    secure = config.secure_aggregation is not None
    yield (
        "Secure aggregation: yes. The server learnt sums of updates, and none of them."
        if secure
        else "Secure aggregation: none. The server saw each client's update."
    )
    if isinstance(config.engine, FlowerEngine):
        yield "Clients were owners of data on machines of their own; their rows did not leave them."
    else:
        yield "Clients were simulated by whoever ran this, who held all rows."


def _results(export: Export, experiment: Experiment) -> str:
    # Without clients' names, and without the log of each seed.
    summaries = {key: {**one, "client": None} for key, one in experiment.summaries.items()}
    dataset = next(iter(datasets(summaries)), None)
    if dataset is None:
        return "It was not evaluated.\n"
    rows = ((summaries[export.key].get("metrics") or {}).get(dataset) or {}).get("overall", {}).get("rows")
    seeds = summaries[export.key].get("seeds") or []
    said = f"On {int(number(rows) or 0):,} held-out rows"
    said += f", means over {len(seeds)} seeds; this is the result of seed {seeds[0]}" if len(seeds) > 1 else ""
    said += ". Up and Down are of all clients together.\n\n"
    return said + comparison_markdown(summaries, dataset)


def _use(export: Export) -> str:
    base = export.base or "PATH/TO/BASE"
    if export.merged:
        lines = ['model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS")']
    else:
        lines = [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "PATH/TO/THIS")',
        ]
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    imports = imports if export.merged else "from peft import PeftModel\n" + imports
    code = imports + "\n" + "\n".join(lines) + '\ntokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS")\n'
    if export.chat_template:
        code += (
            'messages = [{"role": "user", "content": "Name three fruits."}]\n'
            "prompt = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
            "answer = model.generate(**prompt, max_new_tokens=64)[0, prompt.input_ids.shape[1] :]\n"
            "print(tokenizer.decode(answer, skip_special_tokens=True))\n"
        )
        note = "The tokenizer's chat template is the prompt template of the training: prompt through it.\n"
    else:
        note = (
            f"{OWNER} how to prompt it. This tokenizer has no chat template that gives the tokens of the training; "
            "the template is in training_recipe.yaml.\n"
        )
    vllm = ""
    if export.max_lora_rank:
        template = " --chat-template PATH/TO/THIS/chat_template.jinja" if export.chat_template else ""
        vllm = (
            "\nWith vLLM:\n\n```sh\n"
            f"vllm serve {base} --enable-lora --max-lora-rank {export.max_lora_rank} \\\n"
            f"    --lora-modules {export.config.name}=PATH/TO/THIS{template}\n```\n"
        )
    return f"```python\n{code}```\n\n{note}{vllm}"


def _table(rows: Any) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
