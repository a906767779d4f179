"""The recorder of published decisions: it reads a clone's commit, runs what is asked, and says where it is from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[2] / "tools" / "references" / "record.py"
MARK = "ran.txt"
# A decision in a file that, like the published ones, does more when it is imported than a recorder may let it.
SOURCE = f"""
import a_package_that_nobody_has
open({MARK!r}, "w").close()

class STE:
    apply = staticmethod(lambda score, threshold: (score >= threshold).float())

def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

class DiTBlock(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp()

    def create_lazy_learning(self, steps, timesteps):
        self.attn_lazy_learning = nn.ModuleList([nn.Linear(8, 1, bias=False) for _ in range(steps)])
        self.mlp_lazy_learning = nn.ModuleList([nn.Linear(8, 1, bias=False) for _ in range(steps)])

    def forward(self, x, c, accelerate, timestep):
        if timestep == 0 or STE.apply(self.attn_lazy_learning[timestep](x).sum(), 0.0):
            self.attn(x)
        self.mlp(x)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository in the layout of LazyDiT's, without a licence."""
    folder = tmp_path / "clone"
    file = folder / "lazydit" / "models" / "models_lazy_learning_imagenet.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE, encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder


def record(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(RECORD), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_fixture_comes_from_the_commit_and_is_the_same_each_time(clone: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert record("lazydit", clone, "-o", first, cwd=tmp_path).returncode == 0
    (clone / "lazydit" / "models" / "models_lazy_learning_imagenet.py").write_text(
        "raise SystemExit('the working tree')"
    )
    done = record("lazydit", clone, "-o", again, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (first / "lazydit.json").read_text(encoding="utf-8")
    assert (again / "lazydit.json").read_text(encoding="utf-8") == text
    assert '"no licence file"' in text
    assert not (tmp_path / MARK).exists(), "what a file does when it is imported was done"


def test_what_is_no_such_clone_is_refused_in_a_line(clone: Path, tmp_path: Path) -> None:
    elsewhere = record("lazydit", tmp_path, "-o", tmp_path, cwd=tmp_path)
    assert elsewhere.returncode == 1
    assert "is no clone of a git repository" in elsewhere.stderr
    other = record("teacache", clone, "-o", tmp_path, cwd=tmp_path)
    assert other.returncode == 1
    assert "has no TeaCache4FLUX/teacache_flux.py at its HEAD" in other.stderr
    assert "Traceback" not in elsewhere.stderr + other.stderr
    assert not list(tmp_path.glob("*.json"))
