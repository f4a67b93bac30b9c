"""docs/serving-jobs.md says what the code does."""

import re
from pathlib import Path

import yaml

from veralib.serving.gateway.learning import LearningSettings

PAGE = (Path(__file__).parents[3] / "docs/serving-jobs.md").read_text()
CODE = "".join(p.read_text() for p in (Path(__file__).parents[3] / "veralib/serving/gateway").glob("*.py"))


def test_the_settings_on_the_page_are_the_defaults():
    block = PAGE.partition("left out, these.")[2].partition("The remaining")[0]
    shown = yaml.safe_load("\n".join(line.strip() for line in block.splitlines()))
    default = LearningSettings("m", "base")
    assert len(shown) >= 12 and shown == {name: getattr(default, name) for name in shown}


def test_every_code_of_a_failed_job_is_on_the_page_and_in_the_code():
    table = PAGE.partition("| code of a failed job |")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines()[2:] if "|" in line)))
    assert len(listed) == 16 and all(f'"{code}"' in CODE for code in listed)
