"""The benchmarks run, at tiny shapes; no test here looks at a time."""

import fcntl
import json

import pytest
import torch

from benchmarks import bench, measure, render
from benchmarks.models import SHAPES, Contestant, base_model, batch, contest, frozen_tensors


@pytest.fixture
def own_lock(tmp_path, monkeypatch):
    """A lock of the test's own: a real benchmark may be running on this machine."""
    monkeypatch.setattr(measure, "LOCK", tmp_path / "lock")
    threads = torch.get_num_threads()
    yield tmp_path / "lock"
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_quick_bench_writes_every_result_and_the_page(tmp_path, own_lock):
    pytest.importorskip("peft")
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    results = render.load_results(tmp_path)
    assert sorted(results) == ["adapters", "quick-autocast", "quick-bf16", "quick-llama", "quick-roberta"]
    llama = results["quick-llama"]["contestants"]
    assert list(llama) == [
        "frozen", "lora-1", "lora-8", "full", "peft-vera-16", "veralib-16", "peft-vera-4", "veralib-4",
    ]  # fmt: skip
    assert llama["lora-8"]["ratio"]["median"] == 1 and llama["lora-8"]["saved_ratio"] == 1
    assert llama["veralib-16"]["parameters"] == llama["peft-vera-16"]["parameters"]
    assert set(results["adapters"]["contestants"]) == {"veralib-8", "peft-vera-8", "lora-1"}
    assert {"commit", "versions", "processor", "load_average"} <= set(results["quick-llama"]["environment"])
    page = (tmp_path / "README.md").read_text()
    for name in ("**veralib** r=16", "PEFT VeRA r=16", "PEFT LoRA r=1", "full fine-tuning"):
        assert name in page


@pytest.mark.slow
def test_quick_runs_of_the_embedded_engine_part_by_part(tmp_path, own_lock, capsys):
    pytest.importorskip("peft")
    from benchmarks import bench_embedded

    out = tmp_path / "embedded.json"
    for part in ("books-4m", "registered"):
        assert bench_embedded.main(["--quick", "--only", part, "--out", str(out)]) == 0
    found = json.loads(out.read_text())  # the second part left the first alone
    rows = found["models"]["books-4m"]["rows"]
    assert len(rows) == 7 and rows["base"]["ratio"]["median"] == 1
    rows = found["registered"]
    assert [row["registered"] for row in rows] == [8, 16] and all(row["load_ms"]["n"] == 4 for row in rows)
    assert "by the number of adapters in the store: 8: " in capsys.readouterr().out


def test_unknown_benchmark_is_refused_with_the_known_ones(capsys, own_lock):
    assert bench.main(["--only", "llama-9x9"]) == 2
    assert "llama-16x256" in capsys.readouterr().out


def test_a_second_benchmark_waits_for_the_first(own_lock):
    with measure.alone(), open(own_lock, "w") as second, pytest.raises(BlockingIOError):
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(own_lock, "w") as second:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    x, W = torch.randn(8, 4), torch.randn(4, 4, requires_grad=True)
    # x @ W saves x and W; the product saves both its factors, which are two views of one h; sum saves nothing.
    assert measure.saved_bytes(lambda: (h := x @ W).mul(h.view(8, 4)).sum(), [W]) == 4 * (8 * 4 + 8 * 4)


def test_allocations_sees_what_a_function_hides_from_the_hooks():
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x * 2
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.hidden

    x = torch.randn(1000, requires_grad=True)
    assert measure.saved_bytes(lambda: Hiding.apply(x), [x]) == 0
    net, peak = measure.allocations(lambda: Hiding.apply(x))
    assert net >= 4000 and peak >= net


def test_interleave_runs_every_step_in_every_round_and_drops_the_warmup():
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == list("abbaabba")
    assert [len(s) for s in seconds.values()] == [3, 3]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-roberta"])
def test_contestants_leave_the_base_as_it_is_and_start_from_its_outputs(name):
    pytest.importorskip("peft")
    shape = SHAPES[name]
    base = base_model(shape).eval()
    data = batch(shape, 2, 8)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    plain = base(**data).logits
    for contestant in (Contestant("lora", 8), Contestant("peft-vera", 8), Contestant("veralib", 8), Contestant("full")):
        model = contest(base, shape, contestant).eval()
        torch.testing.assert_close(model(**data).logits, plain)
        assert any(p.requires_grad for p in model.parameters())
        assert len(frozen_tensors(model, contestant)) >= len(list(model.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert not any(".vera_" in k for k in base.state_dict())


def test_the_table_goes_between_the_markers_and_nowhere_else():
    text = "top\n<!-- bench -->\nold\n<!-- /bench -->\nend\n"
    assert render.put_between_markers(text, "new") == "top\n<!-- bench -->\nnew\n<!-- /bench -->\nend\n"
    assert render.put_between_markers("no markers", "new") == "no markers"


def test_bf16_goal_is_half_of_pefts_extra_cost():
    result = {
        "goals": {"time": []},
        "ranks": [4],
        "contestants": {"peft-vera-4": {"ratio": {"median": 3.0}}},
    }
    assert render._goals(json.loads(json.dumps(result))) == ["≤ 2.00"]


def test_fleet_and_store_benchmarks_write_their_pages(tmp_path, own_lock):
    from benchmarks import fleet, store

    assert fleet.main(["--quick", "--only", "steps", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert store.main(["--small", "300", "--large", "8", "--out", str(tmp_path)]) == 0
    tables = json.loads((tmp_path / "fleet-steps.json").read_text())["tables"]
    assert [t["batch"] for t in tables] == ["64x64", "16x256"]
    for t in tables:
        assert t["contestants"]["fleet r=64, 512 owners"]["training_bytes_per_parameter"] == pytest.approx(16, rel=0.01)
        assert t["contestants"]["PEFT LoRA r=8"]["ratio"]["median"] == 1
    stores = json.loads((tmp_path / "store.json").read_text())["stores"]
    assert [s["count"] for s in stores] == [300, 8, 8, 8] and all(s["bytes"] > s["payload_bytes"] * s["count"] for s in stores)
    page = (tmp_path / "README.md").read_text()
    assert "| GPT-3 175B | LoRA r=16 | 75,497,472 | 288.0 MiB | 274.7 TiB |" in page


def test_fleets_end_to_end_stand_between_two_halves_of_pefts_owners(tmp_path, own_lock, monkeypatch):
    from benchmarks import fleet, fleet_runs

    order = []

    def noted(name, run):
        return lambda *arguments: order.append(name) or run(*arguments)

    monkeypatch.setattr(fleet_runs, "run_fleet", noted("fleet", fleet_runs.run_fleet))
    monkeypatch.setattr(fleet_runs, "run_peft", noted("peft", fleet_runs.run_peft))
    monkeypatch.setattr(fleet_runs, "run_process", noted("process", lambda *_: 3.0))
    assert fleet.main(["--quick", "--only", "runs", "--threads", "1", "--out", str(tmp_path)]) == 0
    half = ["peft", "peft", "peft", "process"]
    assert order == 2 * [*half, "fleet", *half]
    found = json.loads((tmp_path / "fleet-runs.json").read_text())["examples"]["32"]
    taken, own = (found[n]["seconds"]["median"] for n in ("veralib fleet r=64", "PEFT LoRA r=8, a process each (2 run)"))
    assert own == 12  # 3 s for each of 4 owners
    assert found["PEFT LoRA r=8, a process each (2 run)"]["ratio"]["median"] == pytest.approx(12 / taken)
    assert "| PEFT LoRA r=1, one base (4 run) | 4 |" in (tmp_path / "README.md").read_text()


def test_the_arithmetic_counts_what_veralib_counts():
    from benchmarks import personalise

    counts = {(m, r): personalise.parameters(personalise.LLAMA_7B_QV, m, r) for m, r in personalise.METHODS}
    # notes on the paper's tables: Llama-2 7B, q and v
    assert counts == {("VeRA", 256): 278_528, ("VeRA", 64): 266_240, ("LoRA", 1): 524_288, ("LoRA", 16): 8_388_608}
    m, n, r = 12, 10, 4
    one = personalise.Model("one linear", m * n, 1, ((m, n),))
    # x W, A x, B u forward; their three gradients; B u again for ∂b: 2 FLOPs a product's term.
    assert personalise.flops(one, "VeRA", r) == 2 * (2 * m * n + 2 * (r * n + m * r) + m * r)
    assert personalise.flops(one, "LoRA", r) == 2 * (2 * m * n + 3 * (r * n + m * r))


def test_the_page_holds_what_the_command_prints(capsys):
    from benchmarks import personalise

    personalise.main([])
    assert capsys.readouterr().out.strip() in personalise.PAGE.read_text(encoding="utf-8")


def test_the_serving_page_names_what_was_not_run(tmp_path):
    from benchmarks.bench_serving import page

    text = page(tmp_path)
    assert text.count("ot run here") == 7 and "`python -m benchmarks.soak`" in text
    (tmp_path / "rounds.md").write_text("x")
    row = {"tokens_per_s": {"median": 10}, "step_ms": {"median": 2}, "ratio": {"median": 1.25}}
    model = {"work": {"requests": 4, "prompt": 8, "answer": 2}, "rows": {"base": row}, "load_ms": {"median": 3}}
    (tmp_path / "embedded.json").write_text(json.dumps({"models": {"tiny": model}}))
    text = page(tmp_path)
    assert text.count("ot run here") == 5 and "(rounds.md)" in text and "| base | 10 | 2.0 | 1.25 |" in text
    assert "| tiny, 4 × 8 + 2 tokens |" in text


@pytest.mark.slow
def test_the_gpu_steps_run_on_small_shapes_and_are_rendered(tmp_path, capsys):
    """The scripts and their page alone: times of small shapes on a CPU mean nothing."""
    from benchmarks.gpu import fleet_step, paper_step
    from benchmarks.gpu import render as page

    for script in (paper_step, fleet_step):
        assert script.main(["--tiny", "--out", str(tmp_path)]) == 0
    found = page.load(tmp_path)
    assert not any("failures" in result or "left_out" in result for result in found.values())
    assert [(t["shape"], t["precision"]) for t in found["paper_step"]["tables"]] == [
        (shape, precision) for shape in ("tiny-roberta", "tiny-gpt2") for precision in ("autocast", "float32")
    ]
    counts = {n: f["parameters"] for t in found["fleet_step"]["tables"] for n, f in t["contestants"].items()}
    assert counts["veralib fleet r=8, 4 owners"] == 4 * counts["veralib-8"]
    assert counts["LoRA bank r=16, 4 owners"] == 4 * counts["lora-16"] == 64 * counts["lora-1"]
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.count("the numbers mean nothing") == 2  # each table says so
    assert all(f"| {name} |" in text for name in counts)
