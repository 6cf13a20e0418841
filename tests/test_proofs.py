"""What a test proves something of is all that it goes through, and no more."""

from types import SimpleNamespace

import proofs

D4PG = "tests/algorithms/test_d4pg.py"


def group(nodeid: str, *fixtures: str):
    return proofs.group(SimpleNamespace(nodeid=nodeid, fixturenames=fixtures))


def test_a_file_stands_on_what_it_imports_and_that_imports():
    found = proofs.imported([proofs.ROOT / D4PG])
    assert {
        D4PG, "tests/algorithms/by_hand.py", "algorithms/actor_critic/d4pg.py", "jaxrl_dist/learning/experience.py",
        "jaxrl_dist/learning/replay.py", "jaxrl_dist/distributional/categorical.py", "jaxrl_dist/agent.py",
    } <= found  # fmt: skip
    # No other algorithm, and nothing that it calls as a script.
    assert not {path for path in found if "sac" in path or "running" in path or "cli" in path}


def test_a_package_that_only_passes_names_on_is_followed():
    found = proofs.imported([proofs.ROOT / "tests/envs/test_make.py"])  # `from jaxrl_dist import envs`
    assert {"envs/__init__.py", "envs/registry.py", "envs/brax.py", "jaxrl_dist/running/evaluation.py"} <= found


def test_docstrings_comments_and_layout_prove_nothing(tmp_path):
    def code(name, text):
        (tmp_path / name).write_text(text)
        return proofs.code(tmp_path / name)

    plain = code("plain.py", "def f(x):\n    return x + 1\n")
    assert plain == code("said.py", '"""Says."""\n\ndef f(x):\n    """Adds."""\n    return (x + 1)  # one\n')
    assert plain != code("other.py", "def f(x):\n    return x + 2\n")


def test_agents_have_groups_of_their_own():
    name, subject = group("tests/algorithms/test_every_agent.py::test_probes[td3]", "lived")
    other, of_the_other = group("tests/algorithms/test_every_agent.py::test_probes[ddpg]", "lived")
    assert (name, other) == ("tests/algorithms/test_every_agent.py[td3]", "tests/algorithms/test_every_agent.py[ddpg]")
    assert "algorithms/actor_critic/td3.py" in subject
    assert "algorithms/actor_critic/td3.py" not in of_the_other
    assert group(f"{D4PG}::test_this")[0] == group(f"{D4PG}::test_that[ddpg]")[0].partition("[")[0] == D4PG
    # Rows of other agents are not part of it.
    assert "'target_noise'" in proofs._row("td3")
    assert "'target_noise'" not in proofs._row("ddpg")


def test_some_run_always():
    for nodeid in (
        "tests/algorithms/test_sac.py::test_this", "tests/algorithms/test_every_agent.py::test_probes[dqn]",
        "tests/algorithms/test_every_agent.py::test_every_algorithm_is_tested", "tests/test_cli.py::test_help",
    ):  # fmt: skip
        assert group(nodeid) is None
    assert group("tests/algorithms/test_learning.py::test_learns[td3]", "proof") is None  # it has its own


def test_every_proof_is_renewed_now_and_then(monkeypatch):
    class Day:
        now = 0

        @classmethod
        def today(cls):
            return cls

        @classmethod
        def toordinal(cls):
            return cls.now

    monkeypatch.setattr(proofs.datetime, "date", Day)
    due = []
    for Day.now in range(5, 5 + proofs.RENEWED):
        due += [name for name in proofs.known() if proofs.is_due(name)]
    assert sorted(due) == sorted(proofs.known())
