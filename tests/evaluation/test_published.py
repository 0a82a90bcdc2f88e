"""The seven benchmarks of the paper, from the layouts in which they are published to the report,
with the toy model: one command scores them all.

The sets are those of test_suites.py, a few rows each, spoken by the toy universe. What the toy
model answers is of no account here; that every row arrives where it belongs is.
"""

import json
import re
from pathlib import Path

import pytest
import universe
from sacrebleu.metrics import BLEU
from test_suites import (  # noqa: F401  (the fixtures)
    covost,
    heysquad,
    iemocap,
    meld,
    mustard,
    sd_qa,
    ur_funny,
)

import eval as evaluation
from evaluation import published, suites

MODEL = Path(suites.__file__).parents[1] / "toy" / "diva"
ASKED = {"heysquad": 5, "sd_qa": 6, "covost": 8, "meld": 3, "iemocap": 6, "mustard": 2}
ASKED["ur_funny"] = 3


@pytest.fixture
def folder(request, tmp_path) -> Path:
    """All sets beside each other, and a tasks.json that names them."""
    for name in ASKED:
        request.getfixturevalue(name)
    translations = {"ja": ("「待って」と彼は言った。", "彼女は違うと言った。")}
    translations["zh-CN"] = ("“等等,”他说。", "她说“不”。")
    for language, texts in translations.items():
        rows = [f"{c}.mp3\t{text}\ttest\n" for c, text in zip("ab", texts, strict=True)]
        file = tmp_path / f"covost/covost_v2.en_{language}.tsv"
        file.write_text("path\ttranslation\tsplit\n" + "".join(rows), encoding="utf-8")
    tasks = {name: {"path": "."} for name in ASKED}
    tasks["ur_funny"] = {"path": "ur_funny"}
    tasks["covost"] = {
        "path": "covost",
        "common_voice": "cv/en",
        "languages": ["de", "tr", "ja", "zh-CN"],
    }
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    return tmp_path


def test_all_seven_are_scored_by_one_command(folder, capsys):
    """With the paper's prompts and metrics, for each system and group, beside what was published;
    a clip that is missing is wrong, and reported."""
    out = folder / "out"
    salmonn = [{"task": "covost", "id": f"{code}/a.mp3", "answer": "a"} for code in ("ja", "de")]
    salmonn += [{"task": "meld", "id": "dia0_utt1", "answer": "anger."}]
    salmonn += [{"task": "covost", "id": "zh-CN/a.mp3", "answer": "deng deng, ta shuo"}]
    (folder / "salmonn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in salmonn))
    others = [f"SALMONN={folder}/salmonn.jsonl"]
    with universe.compiled_fast():
        found = evaluation.evaluate(MODEL, [folder], out=out, predictions=others)
    tasks = found["tasks"]
    assert {name: part["n"] for name, part in tasks.items()} == ASKED
    systems = ["untrained", "diva", "cascade", "text", "SALMONN"]
    for name, part in tasks.items():
        metrics = [m for m in suites.SUITES[name].metrics if m != "pedant"]
        assert list(part["metrics"]) == metrics, name
        assert all(list(entries) == systems for entries in part["metrics"].values()), name
        assert part["published"] == published.PUBLISHED[name]
        assert part["errors"]["SALMONN"] > 0 and part["errors"]["cascade"] < part["n"]
    assert list(tasks["sd_qa"]["groups"]) == ["kenya", "usa"]
    assert list(tasks["covost"]["groups"]) == ["de", "ja", "tr", "zh-CN"]
    assert [*tasks["iemocap"]["groups"]] == ["Session1", "Session2", "Session3", "Session5"]

    lines = [json.loads(line) for line in (out / "predictions.jsonl").open(encoding="utf-8")]
    assert len(lines) == 4 * sum(ASKED.values())
    prompts = {(line["task"], line["prompt"]) for line in lines}
    languages = {suites.LANGUAGES[code] for code in ("de", "tr", "ja", "zh-CN")}
    assert {prompt for task, prompt in prompts if task == "covost"} == {
        f"You are a helpful assistant. Translate the inputs from English to {language}."
        for language in languages
    }
    for task in ASKED.keys() - {"covost"}:
        assert (task, suites.SUITES[task].prompt) in prompts
    unheard = {line["id"] for line in lines if "error" in line and line["system"] == "diva"}
    assert unheard == {"56ddde6f", "usa/55555"} and len(found["errors"]) == 2

    assert tasks["meld"]["predicted"]["SALMONN"]["Anger"] == 1, "free text, and class 0"
    assert tasks["meld"]["predicted"]["SALMONN"]["no answer"] == 2
    assert tasks["covost"]["groups"]["zh-CN"]["wrong_script"]["SALMONN"]["score"] == 100
    assert tasks["covost"]["groups"]["ja"]["wrong_script"]["text"]["n"] == 2
    translations_are_scored_by_language_as_sacrebleu_does(tasks["covost"], lines)
    a_metric_is_not_shown_of_groups_that_it_does_not_apply_to(tasks["covost"]["groups"])

    text = capsys.readouterr().out
    assert "read off the published charts" in text and "SALMONN" in text
    assert re.search(r"^covost bleu zh-CN +25\.2 +16\.5 +19\.7 +12\.3$", text, re.MULTILINE)
    assert "tok:ja-mecab" in text and "tok:zh" in text and "tok:13a" in text
    assert "mustard: p against guessing: " in text
    for name in ASKED:
        assert (out / "charts" / f"{name}.png").stat().st_size > 1000


def translations_are_scored_by_language_as_sacrebleu_does(found: dict, lines: list[dict]) -> None:
    """Corpus BLEU with the tokenizer of each language; the headline is their mean."""
    lines = [line for line in lines if line["task"] == "covost" and line["system"] == "text"]
    scores = []
    for code, tokens in (("de", "13a"), ("ja", "ja-mecab"), ("tr", "13a"), ("zh-CN", "zh")):
        some = [line for line in lines if line["group"] == code]
        said = [line["answer"] for line in some]
        wanted = [[line["references"][0] for line in some]]
        scores.append(BLEU(tokenize=tokens).corpus_score(said, wanted).score)
        assert found["groups"][code]["bleu"]["text"]["score"] == pytest.approx(scores[-1])
    assert found["metrics"]["bleu"]["text"]["score"] == pytest.approx(sum(scores) / 4)


def a_metric_is_not_shown_of_groups_that_it_does_not_apply_to(groups: dict) -> None:
    """German is written in Latin letters: no score, and no weight in the correction of p."""
    assert {name for name, part in groups.items() if "wrong_script" in part} == {"ja", "zh-CN"}
    assert all("bleu" in part for part in groups.values())


@pytest.mark.parametrize("flags", [{"batch_size": 0}, {"limit": -1}])
def test_numbers_that_cannot_be_are_refused_at_once(flags):
    with pytest.raises(
        ValueError, match=r"--batch-size .* --limit .*; expected a batch of at least"
    ):
        evaluation.evaluate(MODEL, **flags)


def test_an_unfinished_file_of_ours_counts_with_its_last_lines(tmp_path):
    """An answer that came after a failure counts; one to another prompt does not; half a letter
    does no harm."""
    item = evaluation.Item("qa", None, suites.Example("0", "a.wav", "", ("x",)))
    lines = [("k", None), ("k", "late \ud800"), ("other", "to another prompt")]
    rows = [{"task": "qa", "id": "0", "answer": a, "system": "diva", "key": k} for k, a in lines]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluation.read_predictions(f"before={file}", [item]) == ("before", ["late \ufffd"])


def test_a_file_without_tasks_is_refused(tmp_path):
    (tmp_path / "tasks.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tasks\.json: no tasks; expected at least one"):
        evaluation.read_tasks([tmp_path])
