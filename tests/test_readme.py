"""What the README shows: its blocks run as they stand, in order, on the demo's folder."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import vocabdistil as vd
from tests._families import plain_text
from tests.models.tiny_decoders import tiny_decoder
from vocabdistil import cli
from vocabdistil.distillation.recipes import RECIPES
from vocabdistil.models.students import PRESETS

README = Path(__file__).parent.parent / "README.md"
SET_UP = ("pip install -e . && vocabdistil demo", 'pip install -e ".[test]" && python -m pytest')
# A model that must be downloaded; a small one of its kind stands in for it.
DECODER, TAUGHT = "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.is_file():
        pytest.skip("the README is not beside the tests")
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(readme) -> list[tuple[str, str]]:
    """Language and text of each."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)


def test_the_blocks_run_in_order(blocks, demo_folder, capsys):
    names: dict[str, object] = {}
    printed = ""
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(README), "exec"), names)
        elif language == "text":
            assert block.rstrip() and set(block.splitlines()) <= {line.rstrip() for line in printed.splitlines()}
        elif block.rstrip() not in SET_UP and DECODER not in block:
            assert language == ""
            for command in block.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(command)
                assert program == "vocabdistil"
                assert cli.main(arguments) == 0, command
        printed = capsys.readouterr().out
    assert [language for language, _ in blocks].count("python") >= 3
    before = AutoModel.from_pretrained("vocabdistil-demo/student").state_dict()
    after = AutoModel.from_pretrained("looped").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for folder in ("small", "distilled"):
        assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 2
        assert len(AutoTokenizer.from_pretrained(folder)) == 600


def test_the_commands_for_decoders_run(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in plain_text()), encoding="utf-8")
    block, taught = (block for _, block in blocks if DECODER in block)
    for command in block.splitlines():
        program, *arguments = shlex.split(command.replace(DECODER, str(tiny_decoder("qwen3"))))
        arguments[arguments.index("--vocab-size") + 1] = "420"
        assert program == "vocabdistil" and cli.main(arguments) == 0, command
    assert len(AutoModelForCausalLM.from_pretrained("small-qwen").get_input_embeddings().weight) == 420
    head = load_file("draft-head/model.safetensors")
    assert len(head["lm_head.weight"]) == len(head["d2t"]) == int(head["t2d"].sum()) == 420
    for name, folder in ((DECODER, tiny_decoder("qwen3")), (TAUGHT, tiny_decoder("gpt2"))):
        taught = taught.replace(name, str(folder))
    program, *arguments = shlex.split(taught.replace("\\\n", " "))
    assert program == "vocabdistil" and cli.main([*arguments, "--steps", "2", "--batch-size", "4"]) == 0
    assert AutoModelForCausalLM.from_pretrained("taught").config.model_type == "gpt2"


def test_the_set_up_commands_stand_alone(blocks):
    assert [block.rstrip() for _, block in blocks if "pip install" in block] == list(SET_UP)


def test_what_it_names_is_there(readme):
    public = set(re.findall(r"\bvd\.(\w+)", readme))
    assert public and {name for name in public if not hasattr(vd, name)} == set()
    whole = cli.build_parser()
    (commands,) = (a for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    known = {option for parser in (whole, *commands.choices.values()) for option in parser._option_string_actions}
    # That of the benchmarks.
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", readme)) - known <= {"--ablation", "--e5", "--nproc-per-node"}
    assert set(re.findall(r"\bvocabdistil (?=[a-z])(\w+)(?=`| --)", readme)) <= set(commands.choices)
    rows = set(re.findall(r"^\| `(\w[\w-]*)` \|", readme, re.MULTILINE))
    assert rows == set(RECIPES) and all(f"`{name}` (" in readme for name in PRESETS)
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (README.parent / link).exists(), link
