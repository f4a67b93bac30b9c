"""docs/serving.md: its flags, defaults, metrics and endpoints are the program's."""

import re
from pathlib import Path

import veralib
from veralib.serving.gateway.settings import GatewaySettings

PAGE = (Path(veralib.__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_its_flags_and_defaults_are_the_programs():
    fields = GatewaySettings.model_fields
    engines = {"max-model-len", "tensor-parallel-size", "pipeline-parallel-size", "enable-lora"}
    keys = {"prefix", "note", "admin"}
    named = set(re.findall(r"--([a-z][a-z-]+)", PAGE)) - engines - keys
    unknown = [n for n in named if n.removeprefix("no-").replace("-", "_") not in fields]
    assert len(named) > 20 and not unknown
    rows = re.findall(r"^\|[^|]+\| `--([a-z-]+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    for name, written in rows:
        number, _, unit = written.partition(" ")
        value = 0 if number == "none" else int(number) * {"MiB": 2**20, "": 1}[unit]
        assert fields[name.replace("-", "_")].default == value, name
    assert len(rows) == 15


def test_its_endpoints_and_metrics_exist(world):
    url = world.gateway()
    http = world.http(url, "admin")
    served = set(http.get("/openapi.json").json()["paths"])
    written = {
        p.replace("NAME", "{name}") for p in re.findall(r"`(?:GET |POST |DELETE )?(/[a-zA-Z0-9_/]+)", PAGE.split("## Tenants")[0])
    }
    assert written - {"/openapi"} <= served and len(written) >= 12
    world.http(url).post("/v1/completions", json={"model": "acme:ann", "prompt": "x"})
    page = http.get("/metrics").text
    own = [m for m in re.findall(r"`(vera_[a-z_]*[a-z])", PAGE.split("## Metrics")[1]) if not m.startswith("vera_engine_")]
    assert len(own) >= 9 and all(m in page for m in own)
