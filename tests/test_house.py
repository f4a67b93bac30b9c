"""The house: import directions, what `import veralib` needs, public names, module sizes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import veralib

ROOT = Path(veralib.__file__).parent
# Modules of one line may import each other; otherwise imports run from a later line to an earlier one.
ORDER = [
    {"errors", "container", "sharded", "foreign"},
    {"basis", "products"},
    {"kernels"},
    {"config", "linears", "hashes", "core", "fused"},
    {"adapter", "autograd", "targets", "budget"},
    {"bank", "checks", "segments"},
    {"fleetbank"},
    {"selection", "runtime", "header", "format"},
    {"compiled", "layers"},
    {"heads"},
    {"matching"},
    {"residence", "merge_report", "merging", "root", "checkpoint"},
    {"model"},
    {"attaching"},
    {""},  # veralib/__init__.py
    {"interop"},
    {"store"},
    {"serving"},
    {"baselines"},
    {"training"},
    {"chat_eval", "evaluation"},
    {"fleet"},
    {"recipes"},
    {"demo", "paper"},
    {"commands", "cli", "__main__"},
]
RANK = {name: k for k, names in enumerate(ORDER) for name in names}


def part(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path):
    """(module of veralib, whether it is imported at the top) for every import of veralib's own in a file."""
    tree = ast.parse(path.read_text())
    guards = [i for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)]
    typing_only = {n for guard in guards for n in ast.walk(guard)}
    package = ("veralib", *path.relative_to(ROOT).parts[:-1])
    top = set(tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_only:
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module.split(".") if node.module else ()))
            if target[:1] == ("veralib",):
                for alias in node.names:
                    own = alias.name if (ROOT / f"{alias.name}.py").exists() or (ROOT / alias.name).is_dir() else ""
                    yield (target[1] if len(target) > 1 else own), node in top


def test_imports_run_one_way():
    checked = 0
    for path in sorted(ROOT.rglob("*.py")):
        own = part(path)
        assert own in RANK, f"{path.name}: give {own} a place in ORDER"
        for other, at_top in imports(path):
            if at_top and other != own and own != "":
                assert RANK[other] <= RANK[own], f"{path.relative_to(ROOT)} imports {other or 'veralib'}, which stands above it"
                checked += 1
    assert checked > 40


def test_serving_never_imports_what_trains():
    """Not at the top and not in a function: its jobs are processes, so that a server needs no trainer."""
    files = sorted((ROOT / "serving").rglob("*.py"))
    assert files
    for path in files:
        for other, _ in imports(path):
            assert RANK[other] <= RANK["serving"], f"{path.relative_to(ROOT)} imports {other}"


def test_import_veralib_needs_torch_numpy_and_safetensors_alone():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set("%s".split()):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, veralib
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
vera = veralib.attach(model, veralib.VeraConfig(rank=2, targets="all-linear"))
model(torch.ones(1, 4)).sum().backward()
vera.merge()
print("merged", vera.merged)
"""
    optional = (
        "transformers peft typer rich pydantic accelerate huggingface_hub scipy sklearn bitsandbytes datasets yaml matplotlib"
    )
    done = subprocess.run([sys.executable, "-c", code % optional], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "merged default", done.stderr


def test_public_names_are_sorted_and_exist():
    assert veralib.__all__ == sorted(veralib.__all__)
    for name in veralib.__all__:
        assert getattr(veralib, name).__doc__, name
    assert not hasattr(veralib, "nonsense")


def test_a_module_fits_in_one_reading():
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_every_public_function_says_what_it_gives():
    missing = []
    for path in ROOT.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{path.relative_to(ROOT)}:{node.name}")
    assert not missing


def test_readmes_file_map_names_every_module():
    readme = (ROOT.parent / "README.md").read_text()
    for path in ROOT.iterdir():
        if path.name.startswith("_") or path.suffix not in ("", ".py"):
            continue
        assert re.search(rf"\b{re.escape(path.name)}", readme), f"README's file map lacks {path.name}"


def test_links_between_the_pages_lead_somewhere():
    checked, broken = 0, []
    for page in [*ROOT.parent.glob("*.md"), *ROOT.parent.glob("docs/*.md"), *ROOT.parent.glob("results/**/*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith(("http://", "https://", "mailto:")):
                checked += 1
                if not (page.parent / link).exists():
                    broken.append(f"{page.relative_to(ROOT.parent)}: {link}")
    assert checked > 60 and not broken
