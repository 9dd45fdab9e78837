"""The comparison of the finders runs on some deaths, and says the same in its table and in its record."""

import json
import subprocess
import sys

from nan_cases import DEATHS

from helpers import HERE

SCRIPT = HERE / "tests" / "benchmarks" / "finders.py"
CASES = ["where_trap", "no_edges", "inf_in_a_label"]


def test_some_deaths_give_a_table_and_the_same_as_json(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--cases", *CASES, "--json", "some.json"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, found = done.stdout.splitlines(), json.loads((tmp_path / "some.json").read_text())
    for name, value in (found["environment"] | found["versions"]).items():
        assert f"{name:12s} {value}" in lines
    assert list(found["deaths"]) == CASES
    for name, row in found["deaths"].items():
        table, truth = next(line for line in lines if line.startswith(name)), row.pop("truth")
        assert row["whynan"]["grade"] == "right"
        assert (row["whynan"]["step"], row["whynan"]["phase"]) == (truth["step"], truth["phase"])
        for answer in row.values():
            said = answer["reason"] if answer.get("reason") in ("not installed", "not here") else answer["grade"]
            assert said in table
    where_trap = found["deaths"]["where_trap"]["detect_anomaly"]
    assert where_trap["grade"] == "right" and "LogBackward" in where_trap["says"], "what all agree on"
    for finder, count in found["counts"].items():
        assert sum(count.values()) == len(CASES)
        counted = next(line for line in reversed(lines) if line.startswith(finder))
        assert all(f"{number} {grade}" in counted for grade, number in count.items())


def test_the_readmes_table_of_finders_is_the_recorded_one():
    found = json.loads((HERE / "results" / "finders.json").read_text())
    assert set(found["deaths"]) == set(DEATHS), "the record has all the cases, and no other"
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    grades = "right", "right line, wrong phase", "wrong", "silent", "can't be used"
    assert f"| {' | '.join(grades)} |" in readme and f"We wrote down {len(DEATHS)} deaths" in readme
    for finder, counts in found["counts"].items():
        assert sum(counts.values()) == len(DEATHS)
        assert f"{finder}` | {' | '.join(str(counts.get(grade, 0)) for grade in grades)} |" in readme
