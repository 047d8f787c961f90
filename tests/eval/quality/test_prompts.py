"""Prompt files in the shapes that published sets come in."""

import json
from collections import Counter

import pytest

from dma_diffusers.eval.quality.prompts import BUILT_IN, Prompt, built_in, read_prompts
from dma_diffusers.pipelines.load import named_model

CATS = [Prompt("a cat"), Prompt("two cats, one of them red"), Prompt('a "cat" on a hill')]


def test_the_built_in_set_of_clips():
    prompts, repeated = read_prompts(built_in(named_model("demo-video")))
    assert len(prompts) == 40 and repeated == 0
    assert set(Counter(prompt.category for prompt in prompts).values()) == {4}  # of each motion


def test_the_built_in_set():
    assert built_in(named_model("demo")) == built_in("owner/name") == BUILT_IN
    prompts, repeated = read_prompts(BUILT_IN)
    assert len(prompts) == 200 and repeated == 0
    assert set(Counter(prompt.category for prompt in prompts)) == {
        "alone", "pair", "corners", "between", "three", "several",
    }  # fmt: skip


FILES = {
    "lines.txt": 'a cat\n\n  two cats, one of them red  \r\na "cat" on a hill\n',
    "lines.jsonl": "\n".join(json.dumps({"prompt": cat.text, "category": ""}) for cat in CATS),
    "drawbench.csv": 'Prompts,Category\na cat,\n"two cats, one of them red",\n"a ""cat"" on a hill",\n',
    "parti.tsv": 'Prompt\tCategory\tNote\na cat\t\t\ntwo cats, one of them red\t\t\na "cat" on a hill\t\t\n',
    "mjhq.json": json.dumps({f"id{i}": {"prompt": cat.text} for i, cat in enumerate(CATS)}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_shape_holds_the_same_prompts(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + FILES[name].encode())  # spreadsheets begin files so
    assert read_prompts(tmp_path / name) == (CATS, 0)


def test_categories_come_along(tmp_path):
    path = tmp_path / "drawbench.csv"
    path.write_text("Prompts,Category\na cat,Animals\na red car,Colors\na dog,Animals\n")
    assert [prompt.category for prompt in read_prompts(path)[0]] == ["Animals", "Colors", "Animals"]


def test_quotes_between_tabs_are_the_prompts_own(tmp_path):
    """As in PartiPrompts, whose file quotes nothing."""
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text('Prompt\tCategory\n"G I G G L E" painted on a wall\tSymbols\n"open\tA\na cat\tB\n')
    found = [prompt.text for prompt in read_prompts(path)[0]]
    assert found == ['"G I G G L E" painted on a wall', '"open', "a cat"]


@pytest.mark.parametrize("name", ["lines.txt", "lines.jsonl"])
def test_lines_end_where_files_end_them(tmp_path, name):
    texts = ["a\u2028b", "c\x85d", "e\x0cf"]
    lines = texts if name == "lines.txt" else [json.dumps({"prompt": t}, ensure_ascii=False) for t in texts]
    (tmp_path / name).write_text("\r\n".join(lines), newline="")
    assert [prompt.text for prompt in read_prompts(tmp_path / name)[0]] == texts


def test_repeated_prompts_are_counted_and_left_out(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("a\nb\na\nc\nb\na\nd\n")
    prompts, repeated = read_prompts(path, 3)
    assert [prompt.text for prompt in prompts] == ["a", "b", "c"]
    assert repeated == 3


BAD = {
    ("empty.txt", b"\n \n"): "empty.txt holds no prompts: intervals need at least 3",
    ("few.txt", b"a\nb\na\n"): "few.txt holds 2 prompts: intervals need at least 3",
    ("latin.txt", "a\nb\ncafé\n".encode("latin-1")): "latin.txt is not UTF-8: byte 7 is 0xe9",
    ("set.parquet", b"PAR1"): "prompts come as .txt, .jsonl, .csv, .tsv, .json, not .parquet",
    ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n'): "line 2 is not JSON",
    (
        "names.jsonl",
        b'{"name": "a"}\n',
    ): "line 1 has no prompt: give it one as prompt, prompts, text, caption",
    ("numbers.json", b"[1, 2]"): "entry 1 has no prompt",
    ("number.json", b"3"): "neither a list of objects nor objects by name",
    ("table.csv", b"Title,Category\na,b\n"): "line 2 has no prompt",
}


@pytest.mark.parametrize(("file", "message"), [(file, message) for file, message in BAD.items()])
def test_bad_files_are_one_clear_line(tmp_path, file, message):
    name, content = file
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_prompts(tmp_path / name)
    assert message in str(refused.value) and name in str(refused.value)
    assert "\n" not in str(refused.value)
