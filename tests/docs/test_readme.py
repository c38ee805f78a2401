"""The README: its code runs as pasted, it is short, and its figures stand in the generated table alone."""

import re
import subprocess
import sys
from pathlib import Path

from test_prose import running_text, words

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_code_runs_as_pasted(tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL))
    code += "\nprint('steps of events:', [event.step for event in handle.stats])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps of events: [0, 10, 20, 30, 40]" in done.stdout
    assert list((tmp_path / "out").glob("checkpoint-*/scalora.safetensors"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_it_is_short():
    assert 350 <= sum(len(words(sentence)) for sentence in running_text(README)) <= 500


def test_figures_stand_in_the_table_alone():
    before, rest = README.split("<!-- results:begin -->")
    table, after = rest.split("<!-- results:end -->")
    assert re.search(r"\| \d+\.\d+", table)
    prose = re.sub(r"Python 3\.10|arXiv 2510\.23818", "", " ".join(running_text(before + after)))
    assert not re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])|\d+ ?%", prose)


def test_paths_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
