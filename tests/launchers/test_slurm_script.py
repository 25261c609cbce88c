"""Batch scripts of every shape against files, and their words against a shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from mmlg_launchers import Cluster, LaunchError, Resources, SlurmLauncher, Step, load_cluster
from mmlg_launchers.cluster import Container
from mmlg_launchers.slurm_graph import Planned, batches, plan_graph
from mmlg_launchers.slurm_script import Batch, Task, batch_script

SCRIPTS = Path(__file__).with_name("scripts")
RUNS = Path("/runs")
TRAIN = ("/venv/bin/python", "-m", "mmlg_scale", "train", "my recipe.yaml", "--data.path", "/data/it's here", "--out", "/runs/ancestor")
SITE = Cluster(
    partition="gpu",
    account="my-project",
    qos="long",
    constraint="a100&ib",
    exclude=["node17", "node23"],
    gpu_type="a100",
    sbatch={"reservation": "mine", "mail-type": "FAIL"},
    modules=["cuda/12.8", "gcc 13"],
    environment={"GREETING": "it's $HOME", "EMPTY": ""},
    nccl={"SOCKET_IFNAME": "ib0"},
    scratch="/scratch/{user}/{job_id}/tmp",
    cache="/scratch/{user}/cache",
    python="/opt/mmlg/bin/python",
    save_seconds=100,
    unsafe_shell_setup=["ulimit -n 65536"],
)


def batch(*argvs: tuple[str, ...], resources: Resources, **settings: object) -> Batch:
    tasks = tuple(
        Task(argv, RUNS / (f"i{number}.launch" if len(argvs) > 1 else "ancestor.launch"), RUNS / "ancestor" / "checkpoints")
        for number, argv in enumerate(argvs)
    )
    folder = RUNS / "arrays" / "i0" if len(argvs) > 1 else tasks[0].folder
    return Batch("mmlg-train", tasks, resources, folder, Path("/home/me/work"), **settings)  # type: ignore[arg-type]


def steps() -> list[Step]:
    one, ranks = Resources(), Resources(num_processes=4, gpus_per_node=4)
    names = {"data": (one, ()), "ancestor": (ranks, ("data",)), "gene": (ranks, ("ancestor",))}
    found = [Step(name, ("mmlg", name), wanted, needs, RUNS / name / "result.json") for name, (wanted, needs) in names.items()]
    found += [Step(f"i{n}", ("mmlg", f"i{n}"), ranks, ("gene",), RUNS / "descendants" / f"i{n}" / "result.json") for n in (1, 2, 3)]
    needs = tuple(step.id for step in found)
    return [*found, Step("report", ("mmlg", "report"), one, needs, RUNS / "family.json")]


def scripts() -> dict[str, str]:
    eight = Resources(num_processes=8, gpus_per_node=8, cpus_per_process=12, memory_gib=480, time="2-00:00:00")
    nodes = Resources(num_processes=8, num_nodes=4, gpus_per_node=8)
    one = Resources(gpus_per_node=1)
    others = [(*TRAIN[:-1], f"/runs/i{number}") for number in range(3)]
    found = {
        "one-process": (batch(TRAIN, resources=Resources()), Cluster()),
        "one-node": (batch(TRAIN, resources=eight), Cluster()),
        "nodes": (batch(TRAIN, resources=nodes, needs=("17", "18_2")), Cluster()),
        "preflight": (batch(TRAIN, resources=nodes, preflight=("python", "-m", "mmlg_launchers.preflight", "--gpus=8")), Cluster()),
        "site": (batch(TRAIN, resources=nodes, environment={"MINE": "a b"}), SITE),
        "array": (batch(*others, resources=one, max_parallel=2), Cluster()),
        "pyxis": (batch(TRAIN, resources=nodes), Cluster(pyxis=Container("/images/my image.sqsh", ["/data:/data", "/home:/home"]))),
        "apptainer": (batch(TRAIN, resources=one), Cluster(apptainer=Container("/images/mmlg.sif", ["/data:/data"]))),
    }
    texts = {name: batch_script(made, cluster, user="me") for name, (made, cluster) in found.items()}
    launcher = SlurmLauncher(Cluster(), Path("/home/me/work"), name="family")
    parts = batches(plan_graph(steps(), lambda step, needs_complete: step.id == "data"), launcher, RUNS, max_parallel=None)
    texts["graph"] = "\n".join(f"# ---- {part.name}\n{batch_script(part, Cluster(), user='me')}" for part in parts)
    return texts


@pytest.mark.parametrize("name", ["one-process", "one-node", "nodes", "preflight", "site", "array", "pyxis", "apptainer", "graph"])
def test_script_of_each_shape(name: str) -> None:
    """After a change that is meant: `python -m tests.launchers.test_slurm_script` writes the files anew; read their difference."""
    assert scripts()[name] == (SCRIPTS / f"{name}.sh").read_text()


def test_every_script_is_a_shell_s_and_every_word_its_own() -> None:
    for name, script in scripts().items():
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).stderr == "", name
    hostile = ("python", "a b", "$HOME", "`id`", "it's", '"', "*", "", ";exit 3", "\\", "%j", "-n")
    script = batch_script(batch(hostile, resources=Resources()), Cluster(environment={"VALUE": "$(id) 'x'"}), user="me")
    lines = script.split("\n\n")
    shown = subprocess.run(
        ["bash", "-c", f'{lines[2]}\n{lines[3]}\nprintf "%s\\0" "$VALUE" "$@"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split("\0")[:-1] == ["$(id) 'x'", *hostile]


def test_a_graph_is_submitted_in_parts_that_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting:
        id = "17"

    monkeypatch.setattr("mmlg_launchers.slurm_graph.active_job", lambda folder: Waiting() if folder.name == "ancestor.launch" else None)
    asked = []

    def is_complete(step: Step, needs_complete: bool) -> bool:
        asked.append((step.id, needs_complete))
        return step.id == "data"

    planned = plan_graph(steps(), is_complete)
    assert (planned.complete, planned.active) == (("data",), {"ancestor": "17"})
    assert [([step.id for step in part.steps], part.needs) for part in planned.parts] == [
        (["gene"], ("17",)),
        (["i1", "i2", "i3"], ("step:gene",)),
        (["report"], ("17", "step:gene", "step:i1", "step:i2", "step:i3")),
    ]
    assert asked[:2] == [("data", True), ("gene", False)]
    assert plan_graph(steps()[:1], lambda *_: True) == Planned(("data",), {}, ())


def test_shipped_clusters_load_and_documented_keys_exist(tmp_path: Path) -> None:
    assert load_cluster("generic") == Cluster()
    assert load_cluster("single-node").nccl == {"IB_DISABLE": "1", "SOCKET_IFNAME": "lo"}
    text = (Path(load_cluster.__code__.co_filename).parent / "clusters" / "generic.yaml").read_text()
    file = tmp_path / "all.yaml"
    # Its commented keys, and one of the two containers.
    lines = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ") and ": " in line and line[2].islower()]
    file.write_text("\n".join(line for line in lines if not line.startswith("apptainer")))
    cluster = load_cluster(str(file))
    assert (cluster.partition, cluster.gpus_per_node, cluster.time, cluster.exclude) == ("gpu", 8, "2-00:00:00", ["node17", "node23"])
    assert cluster.sbatch == {"reservation": "my-reservation", "mail-type": "FAIL"}
    assert cluster.pyxis == Container("/images/mmlg.sqsh", ["/data:/data"])
    assert cluster.unsafe_shell_setup == ["ulimit -n 65536"]
    assert Cluster().signal_seconds == 90
    assert Cluster(save_seconds=100).signal_seconds == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partitoin: gpu", "unknown key 'partitoin'. Did you mean partition? Valid keys: partition, account, qos,"),
        ("setup: [rm -rf /]", "unknown key 'setup'."),
        ("gpus_per_node: many", "gpus_per_node"),
        ("exclude: node1", "exclude"),
        ("partition: |\n  gpu\n  #SBATCH --uid=0", "line break"),
        ("environment: {'A; id': x}", "is no name of a variable"),
        ("sbatch: {uid root: x}", "is no long option"),
        ("sbatch: {output: x}", "sbatch: output has a key"),
        ("time: tomorrow", "is no time limit"),
        ("pyxis: {image: a}\napptainer: {image: b}", "Keep one"),
        ("pyxis: image", "pyxis: give a mapping"),
        ("pyxis: {picture: a}", "pyxis: give a mapping"),
        ("[1, 2]", "no mapping"),
        ("a: &a [1]\nb: *a", "aliases"),
        ("a: {", "not valid YAML"),
    ],
)
def test_a_cluster_file_with_a_mistake_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(LaunchError) as raised:
        load_cluster(str(file))
    assert str(raised.value).startswith(f"cluster file {file}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_cluster_lists_the_shipped_ones() -> None:
    with pytest.raises(LaunchError, match="generic, single-node"):
        load_cluster("nowhere")


if __name__ == "__main__":
    for name, text in scripts().items():
        (SCRIPTS / f"{name}.sh").write_text(text)
