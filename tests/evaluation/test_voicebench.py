"""voicebench.py: small sets in the Hub's layout, the export of responses, and the import of
verdicts and scores. The rows are made up.
"""

import json
import os
import types
from pathlib import Path

import pyarrow as pa
import pytest
from test_suites import SOUND, WAV, put, refused, shard

import eval as evaluation
from evaluation import metrics, published, report, significance, systems, voicebench
from evaluation.tasks import read_tasks

KWARGS = pa.list_(pa.struct([("num_words", pa.int64()), ("relation", pa.string())]))
COLUMNS = {
    "reference": pa.string(),
    "id": pa.string(),
    "key": pa.int64(),
    "instruction_id_list": pa.list_(pa.string()),
    "kwargs": KWARGS,
    "output": pa.string(),
}
RULES = {"key": 1000, "instruction_id_list": ["length_constraints:number_words"]}
ROWS = {  # {subset/split: what a row has beside audio and prompt}
    "alpacaeval_full/test": [{"output": "not read"}, {"output": "not read"}],
    "commoneval/test": [{}],
    "wildvoice/test": [{}],
    "sd-qa/usa": [{"reference": "Paris"}, {"reference": "1066"}],
    "sd-qa/aus": [{"reference": "Paris"}],
    "mmsu/law": [{"reference": "A"}],
    "mmsu/physics": [{"reference": "C"}, {"reference": "D"}],
    "openbookqa/test": [{"reference": "B"}],
    "bbh/test": [
        {"reference": "Yes", "id": "bbh_navigate_7"},
        {"reference": "(B)", "id": "bbh_hyperbaton_1"},
    ],
    "ifeval/test": [RULES | {"kwargs": [{"num_words": 5, "relation": None}]}],
    "advbench/test": [{}],
}


@pytest.fixture
def hub(tmp_path) -> Path:
    """hlt-lab/voicebench as downloaded: a folder for each subset, shards by split."""
    for place, rows in ROWS.items():
        subset, split = place.split("/")
        schema = {name: COLUMNS[name] for name in rows[0]}
        said = [{"prompt": f" {place} {n}? "} for n in range(len(rows))]
        rows = [
            {"audio": {"bytes": WAV, "path": None}} | s | r for s, r in zip(said, rows, strict=True)
        ]
        schema = pa.schema({"audio": SOUND, "prompt": pa.string()} | schema)
        file = shard(tmp_path, rows, schema, f"{split}-00000-of-00001.parquet")
        put(tmp_path / "hub" / subset / file.name, file.read_bytes())
        file.unlink()
    return tmp_path / "hub"


# ------------------------------------------------------------------------------------ the sets


def test_one_path_names_the_nine_sets_of_the_leaderboard(hub):
    """Each with its own metrics, without a prompt, and with room for an essay, as there."""
    tasks = read_tasks([f"voicebench={hub}"])
    *nine, overall = published.VOICEBENCH["DiVA, published"]
    assert list(tasks) == [voicebench.task_of(subset) for subset in nine] and overall == "overall"
    assert {task.prompt for task in tasks.values()} == {None}
    assert {task.max_new_tokens for task in tasks.values()} == {2048}
    assert {len(task.examples) for task in tasks.values()} == {1, 2, 3}
    for task in tasks.values():
        assert all(Path(e.audio).read_bytes() == WAV for e in task.examples)
        assert all(e.text and e.text == e.text.strip() for e in task.examples)
    assert tasks["voicebench_ifeval"].metrics == ("prompt_ignoring",)


def test_subjects_and_countries_are_groups(hub):
    """All subjects; of the countries the one that the leaderboard has, or all."""
    mmsu = voicebench.reads("mmsu")(hub)
    assert [(e.id, e.group, e.answers) for e in mmsu] == [
        ("law/0", "law", ("A",)),
        ("physics/0", "physics", ("C",)),
        ("physics/1", "physics", ("D",)),
    ]
    read = voicebench.reads("sd-qa")
    assert [e.id for e in read(hub / "sd-qa")] == ["usa/0", "usa/1"]
    assert {e.group for e in read(hub, "all")} == {"aus", "usa"}
    refused(FileNotFoundError, lambda: read(hub, "mars"), "mars", "found aus, usa")


def test_a_row_keeps_what_its_rule_needs(hub):
    """The id, of which the kind of BIG-Bench Hard is a part; what is to be obeyed, without what is
    not set; nothing of what is judged."""
    assert [e.id for e in voicebench.reads("bbh")(hub)] == ["bbh_navigate_7", "bbh_hyperbaton_1"]
    (asked,) = voicebench.reads("ifeval")(hub)
    assert asked.id == "1000" and json.loads(asked.answers[0]) == RULES | {
        "kwargs": [{"num_words": 5}]
    }
    assert [e.answers for e in voicebench.reads("alpacaeval_full")(hub)] == [(), ()]


# ------------------------------------------------------------------------------ export and import


@pytest.fixture
def scored(hub, tmp_path, monkeypatch):
    """evaluate() over all nine, with stand-ins for models and classifier."""

    def answer(models, questions, lacking, transcripts, batch_size, tell):
        for i, some in enumerate(lacking):
            for system in sorted(some):
                tell(i, system, None if system == "untrained" else f"The answer is B, {system}", {})

    classifier = types.SimpleNamespace(evaluate=lambda wanted, said, asked: "diva" in said)
    monkeypatch.setattr(systems.Models, "load", staticmethod(lambda folder: None))
    monkeypatch.setattr(systems, "answer", answer)
    monkeypatch.setattr(report, "chart", lambda *_: None)
    monkeypatch.setattr(significance, "RESAMPLES", 50)
    monkeypatch.setattr(metrics, "judge", lambda: (classifier, "stand-in"))
    model = put(tmp_path / "model/config.json", "{}").parent
    return lambda: evaluation.evaluate(model, [f"voicebench={hub}"], out=tmp_path / "out")


def judge(file: Path, score) -> None:
    """What the benchmark's api_judge.py makes of a file."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    text = "".join(json.dumps(row | {"score": score(row)}) + "\n" for row in rows)
    file.with_name(f"result-{file.name}").write_text(text)


PRINTED = {  # what evaluate.py logs of each part
    "mmsu": "{'acc': 25.0, 'fail': 0.0}",
    "openbookqa": "{'acc': np.float64(100.0), 'fail': 0}",
    "bbh": "{'acc': 75.0, 'fail': 2.5}",
    "ifeval": "{'strict-prompt': 0.5, 'final': 0.875}",
    "advbench": "{'refusal_rate': np.float64(0.5)}",
    "sd-qa": "{'panda': 60.0, 'gpt': np.float64(50.0)}",
}


def evaluate_officially(file: Path, subset: str) -> Path:
    """What `python evaluate.py --src_file FILE 2> score-FILE.txt` leaves behind."""
    score = file.with_name(f"score-{file.stem}.txt")
    printed = PRINTED.get(subset, "{'gpt': 4.5}")
    return put(score, f"2025-06-12 10:00:00.000 | INFO | __main__:main:20 - {printed}\n")


def test_responses_are_exported_in_the_scorers_format(scored, tmp_path):
    scored()
    responses = sorted((tmp_path / "out/voicebench").iterdir())
    assert len(responses) == 9 * 4
    lines = {file.stem: json.loads(file.read_text().split("\n")[0]) for file in responses}
    assert lines["diva-voicebench_wildvoice"] == {
        "id": "0",
        "prompt": "wildvoice/test 0?",
        "response": "The answer is B, diva",
    }
    assert lines["untrained-voicebench_bbh"]["response"] == ""
    assert lines["text-voicebench_bbh"]["reference"] == "Yes"
    ifeval = {"kwargs": [{"num_words": 5}], "prompt": "ifeval/test 0?"} | RULES
    assert lines["diva-voicebench_ifeval"].items() >= ifeval.items()


def test_the_judges_verdicts_give_scores_with_intervals(scored, tmp_path, caplog):
    found = scored()
    assert [*found["tasks"]["voicebench_wildvoice"]["metrics"]] == ["prompt_ignoring"]
    assert (
        "judged is left out: no verdict on 2 answers of untrained, 2 answers of diva" in caplog.text
    )
    for file in sorted((tmp_path / "out/voicebench").iterdir()):
        numbers = lambda row: ["4", "[[5]]", "4.5"] if "diva" in row["response"] else ["1"] * 3  # noqa: E731
        words = lambda row: ["Yes", "No", "Yes"] if "usa/0" in row["id"] else ["No"] * 3  # noqa: E731
        judge(file, words if "sd_qa" in file.name else numbers)
    tasks = scored()["tasks"]
    wildvoice = tasks["voicebench_wildvoice"]["metrics"]["judged"]
    assert wildvoice["diva"]["score"] == pytest.approx(90)
    assert wildvoice["untrained"]["score"] == pytest.approx(20)
    sd_qa = tasks["voicebench_sd_qa"]["metrics"]
    assert (sd_qa["judged"]["diva"]["score"], sd_qa["pedant_right"]["diva"]["score"]) == (50, 100)


def test_the_leaderboard_holds_the_official_scores_of_all_nine_parts(scored, tmp_path, capsys):
    """Without the official scores there is no leaderboard; `overall` needs all nine."""
    assert "voicebench" not in scored()
    folder = tmp_path / "out/voicebench"
    for subset in voicebench.BOARD[1:]:
        for system in ("diva", "text"):
            file = voicebench.responses_file(folder.parent, system, voicebench.task_of(subset))
            evaluate_officially(file, subset)
    assert [*scored()["voicebench"]["diva"]] == [*voicebench.BOARD[1:]]

    evaluate_officially(folder / "diva-voicebench_alpacaeval_full.jsonl", "alpacaeval_full")
    capsys.readouterr()
    board = scored()["voicebench"]
    diva = {"alpacaeval_full": 90, "commoneval": 90, "wildvoice": 90, "sd-qa": 55}
    diva |= {"mmsu": 25, "openbookqa": 100, "bbh": 75, "ifeval": 87.5, "advbench": 50}
    assert board["diva"] == pytest.approx(diva | {"overall": sum(diva.values()) / 9})
    assert "overall" not in board["text"] and board["text"]["bbh"] == 75
    text = capsys.readouterr().out
    assert f"diva{90:24.2f}{90:8.2f}{90:8.2f}{55:8.2f}" in text
    assert "DiVA, published        73.40   70.80   74.80   57.05" in text
    assert max(map(len, voicebench.table(board))) <= 100


def test_a_score_older_than_its_responses_is_ignored(scored, tmp_path, caplog):
    scored()
    file = tmp_path / "out/voicebench/diva-voicebench_bbh.jsonl"
    score = evaluate_officially(file, "bbh")
    assert scored()["voicebench"] == {"diva": {"bbh": 75}}
    os.utime(score, (1, 1))
    assert "voicebench" not in scored()
    assert f"{score} is older than the responses" in caplog.text


def test_an_output_without_the_score_is_refused(scored, tmp_path):
    scored()
    file = tmp_path / "out/voicebench/diva-voicebench_advbench.jsonl"
    score = evaluate_officially(file, "bbh")
    refused(ValueError, scored, score, "expected refusal_rate", "--evaluator harm")


def test_a_verdict_that_is_none_is_named(scored, tmp_path):
    scored()
    file = tmp_path / "out/voicebench/diva-voicebench_wildvoice.jsonl"
    judge(file, lambda row: ["4", "good"])
    refused(ValueError, scored, f"result-{file.name}:1", "['4', 'good']", "1 to 5, or Yes and No")


def test_what_is_published_adds_up():
    """The leaderboard's overall is the mean of its nine, those of 1 to 5 times 20."""
    for scores in published.VOICEBENCH.values():
        parts = [scores[subset] for subset in voicebench.BOARD]
        assert sum(parts) / 9 == pytest.approx(scores["overall"], abs=0.0051)  # two digits
