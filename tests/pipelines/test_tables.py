"""Test the reader of prompt and job files on what spreadsheets write; a bad line is named and stands alone."""

from pathlib import Path

import pytest

from dma_diffusers.eval.quality.prompts import read_prompts
from dma_diffusers.pipelines.jobs import read_jobs
from dma_diffusers.pipelines.tables import read_entries

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".yaml", ".yml")


def entries_of(path: Path, content: str | bytes) -> list:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_entries(path, SUFFIXES, "entries")


def values(path: Path, content: str | bytes) -> list:
    """The entries alone, errors as their words."""
    return [str(entry) if isinstance(entry, Exception) else entry for _, entry in entries_of(path, content)]


TABLE = [{"prompt": "a cat, red", "seed": "1"}, {"prompt": 'a "dog"', "seed": "2"}]
TABLES = {
    "commas": 'prompt,seed\n"a cat, red",1\n"a ""dog""",2\n',
    "semicolons": 'prompt;seed\na cat, red;1\n"a ""dog""";2\n',
    "tabs": 'prompt\tseed\na cat, red\t1\n"a ""dog"""\t2\n',
    "Excel's own line": 'sep=;\r\nprompt;seed\r\na cat, red;1\r\n"a ""dog""";2\r\n',
    "Windows": 'prompt,seed\r\n"a cat, red",1\r\n"a ""dog""",2\r\n',
    "old Macs": 'prompt,seed\r"a cat, red",1\r"a ""dog""",2\r',
    "empty last rows and columns": 'Prompt, SEED ,,\n"a cat, red",1,,\n"a ""dog""",2,,\n,,,\n , ,,\n\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_spreadsheets_write_is_one_table(tmp_path, name, encoding):
    found = values(tmp_path / "t.csv", TABLES[name].encode(encoding))
    assert [{key: value for key, value in row.items() if key} for row in found] == TABLE


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_prompts_of_a_single_column_keep_their_commas(tmp_path, suffix):
    texts = ["a red apple, left of a cat", "a dog; running, at night"]
    content = "\n".join([*["prompt"] * (suffix != ".txt"), *texts])
    assert [row["prompt"] for row in values(tmp_path / f"t{suffix}", content)] == texts


def test_commas_outside_of_quotes_name_the_line(tmp_path):
    content = "prompt,category\na cat,x\na dog, running, at night,x\na boat,y\n"
    (where, error), *_ = [
        each for each in entries_of(tmp_path / "t.csv", content) if isinstance(each[1], Exception)
    ]
    assert where == "line 3"
    assert str(error) == "it has 4 cells, the header 2: cells whose text has commas need quotes"


@pytest.mark.parametrize("end", ["", 'a "car",z\n', '"a car",z\n'])
def test_an_open_quote_spoils_its_line_alone(tmp_path, end):
    content = 'prompt,category\na cat,x\n"a sign, hello,y\na house,y\n' + end
    found = entries_of(tmp_path / "t.csv", content)
    assert [where for where, entry in found if isinstance(entry, Exception)] == ["line 3"]
    assert [entry["prompt"] for _, entry in found if isinstance(entry, dict)][:2] == ["a cat", "a house"]
    assert len(found) == 3 + bool(end)


def test_a_cell_of_several_lines_is_one(tmp_path):
    found = entries_of(tmp_path / "t.csv", 'prompt,seed\n"a cat\nand a dog",1\na boat,2\n')
    assert found == [
        ("line 2", {"prompt": "a cat\nand a dog", "seed": "1"}), ("line 4", {"prompt": "a boat", "seed": "2"})
    ]  # fmt: skip


def test_a_quote_amid_a_cell_is_text(tmp_path):
    assert values(tmp_path / "t.csv", 'prompt,seed\na 5" pipe,1\n') == [{"prompt": 'a 5" pipe', "seed": "1"}]


@pytest.mark.parametrize("name", ["T.CSV", "t.Jsonl", "t.YAML", "t.JSON", "T.TXT", "t.Tsv"])
def test_suffixes_have_any_case(tmp_path, name):
    content = {
        ".csv": "prompt\na cat\n", ".jsonl": '{"prompt": "a cat"}', ".yaml": "- prompt: a cat", ".txt": "a cat",
        ".json": '[{"prompt": "a cat"}]', ".tsv": "prompt\na cat",
    }[Path(name).suffix.lower()]  # fmt: skip
    assert values(tmp_path / name, content) == [{"prompt": "a cat"}]


@pytest.mark.parametrize(
    "name", ["negative prompt", " Negative_Prompt ", "NEGATIVE-PROMPT", "negative  prompt"]
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".yaml"])
def test_names_of_fields_in_any_spelling(tmp_path, name, suffix):
    content = {
        ".csv": f"prompt,{name}\na cat,dogs\n", ".jsonl": f'{{"prompt": "a cat", "{name}": "dogs"}}',
        ".yaml": f'- prompt: a cat\n  "{name}": dogs\n',
    }[suffix]  # fmt: skip
    assert values(tmp_path / f"t{suffix}", content) == [{"prompt": "a cat", "negative_prompt": "dogs"}]


def test_a_field_in_two_spellings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the header has negative_prompt more than once"):
        entries_of(tmp_path / "t.csv", "prompt,negative prompt,Negative-Prompt\na,b,c\n")


def test_another_encoding_names_byte_and_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"t.csv is not UTF-8: byte 20 is 0xe9, in line 3: save it as UTF-8$"
    ):
        entries_of(
            tmp_path / "t.csv", "prompt,seed\na,1\ncaf\u00e9,2\n".encode("latin-1").replace(b"a,1", b"ab,1")
        )


def test_jobs_take_numbers_as_spreadsheets_write_them(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(
        "prompt;seed;steps;size;fps;frames;dense_above_sigma;protect_text\n"
        "a cat;3.0;1E+01;64 x 48;12,5;5.0;0,9;TRUE\n; ;;;;;;\n"
    )
    (job,), failures = read_jobs(path, {})
    assert not failures
    assert (job.seed, job.steps, job.size, job.fps, job.frames) == (3, 10, (64, 48), 12.5, 5)
    assert (job.config.dense_above_sigma, job.config.protect_text) == (0.9, True)


def test_jobs_take_no_fraction_for_a_count(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text("prompt,steps\na cat,3.5\n")
    assert "steps must be a whole number from 1" in read_jobs(path, {})[1][0].error


def test_both_commands_say_the_same_of_a_file(tmp_path):
    """An open quote, and a row that is too long: `batch` goes on, `eval` and `calibrate` name the first."""
    path = tmp_path / "t.csv"
    path.write_text('prompt,model\na cat,demo\n"a dog,demo\na boat,demo,2,3\na house,demo\n')
    jobs, failures = read_jobs(path, {})
    assert [job.prompt for job in jobs] == ["a cat", "a house"]
    assert [(failure.where, failure.error) for failure in failures] == [
        ("line 3", "it is not CSV: a quote opens here and is not closed"),
        ("line 4", "it has 4 cells, the header 2: cells whose text has commas need quotes"),
    ]
    with pytest.raises(ValueError, match=r"t\.csv: line 3 is not CSV: a quote opens here and is not closed"):
        read_prompts(path)


def test_few_prompts_do_where_nothing_is_estimated(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a cat\n")
    assert [prompt.text for prompt in read_prompts(path, fewest=1)[0]] == ["a cat"]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"t\.txt holds no prompts$"):
        read_prompts(path, fewest=1)
