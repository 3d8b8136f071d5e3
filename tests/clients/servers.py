"""Try vLLM, SGLang, LMDeploy, torchtitan and Automodel, as they are published, over our `deep_ep`, on CPU ranks.

    python tests/clients/servers.py FOLDER

is not part of the tests. It downloads their wheels into FOLDER, once (500 MB; 1.4 GB on disk with what they import),
unpacks their Python files, and prints what worked. Their compiled parts are not used: what runs is the code between
their layers and `deep_ep`. It runs with the plug-ins on, and beside another package `deep_ep`, which must not be found.
"""

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLIENTS = ("vllm==0.33.0", "sglang==0.5.23", "lmdeploy==0.14.0", "torchtitan==0.3.0", "nemo-automodel==0.7.0")
TORCHVISION = "torchvision==0.28.0"
"""SGLang imports it. Its compiled part is linked against one build of torch, often not the one that is there."""

UNPACKED = (".py", ".json", "METADATA", ".cuh", ".h")
"""SGLang looks for the folders of its headers when it is imported."""

IMPORTED = (  # by their Python files, beside what the extra `test` installs
    *("aiohttp", "apache-tvm-ffi", "cachetools", "cbor2", "certifi", "cloudpickle", "compressed-tensors", "dill"),
    *("einops", "fastapi", "gguf", "ipython", "llguidance", "msgspec", "openai", "openai-harmony"),
    *("opentelemetry-api", "orjson", "partial-json-parser", "prometheus-client", "py-cpuinfo", "pybase64", "pyzmq"),
    *("requests", "sentencepiece", "triton", "uvloop", "xgrammar"),
)
CHECKS = {
    "vllm": ("plug-in", "high throughput", "low latency", "v2, prefill", "v2, decode"),
    "sglang": ("plug-in", "normal", "low latency", "auto", "v2, prefill", "v2, decode"),
    "lmdeploy": ("normal", "low latency"),
    "torchtitan": ("training", "inference", "hybridep", "hybridep, non-blocking"),
    "nemo-automodel": ("deepep", "hybridep"),
}


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True)


def prepare(folder: Path) -> None:
    """Download and unpack what is not there yet, and make the metadata and the packages that the checks find."""
    folder.mkdir(parents=True, exist_ok=True)
    imported = folder / "imported"
    if not imported.exists():
        # Their dependencies without torch and others that the environment of the tests has already.
        plan = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *IMPORTED],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = [each["metadata"] for each in json.loads(plan.stdout)["install"]]
        pinned = [f"{each['name']}=={each['version']}" for each in found]
        pip("install", "--quiet", "--no-deps", "--target", str(imported), *pinned)
    for client in (*CLIENTS, TORCHVISION):
        name = client.partition("==")[0]
        if not (folder / name).exists():
            pip("download", "--quiet", "--no-deps", "--dest", str(folder), client)
            wheel = next(folder.glob(f"{name.replace('-', '_')}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                names = [each for each in archive.namelist() if each.endswith(UNPACKED)]
                archive.extractall(folder / name, names)
            wheel.unlink()
    other, info = folder / "plug-ins" / "deep_ep", folder / "plug-ins" / "tokenferry-0.dist-info"
    other.mkdir(parents=True, exist_ok=True)
    info.mkdir(exist_ok=True)
    (other / "__init__.py").write_text('raise ImportError("this is the other deep_ep")\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tokenferry\nVersion: 0\n")
    points = {"vllm.general_plugins": "for_vllm", "sglang.srt.plugins": "for_sglang"}
    lines = [f"[{group}]\ntokenferry = tokenferry.integrations.deep_ep:{name}\n" for group, name in points.items()]
    (info / "entry_points.txt").write_text("".join(lines))


def environment(folder: Path, client: str) -> dict[str, str]:
    path = [folder / "plug-ins", folder / client, folder / "imported", ROOT / "src", ROOT / "tests"]
    if client == "sglang":
        path.append(folder / "torchvision")
    if client in ("lmdeploy", "torchtitan", "nemo-automodel"):  # they load no plug-ins
        path.insert(0, ROOT / "src/tokenferry/compat/deep_ep_path/site")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "TOKENFERRY_AS_DEEP_EP": "1",
        "TOKENFERRY_BACKEND": "cpu",
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def main(folder: Path) -> int:
    prepare(folder)
    failed = 0
    for client in CLIENTS:
        name = client.partition("==")[0]
        for check in CHECKS[name]:
            command = [sys.executable, Path(__file__).with_name("servers_checks.py"), name, check, str(folder / name)]
            done = subprocess.run(
                command, env=environment(folder, name), capture_output=True, text=True, timeout=300, check=False
            )
            failed += done.returncode != 0
            said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
            verdict = "PASS" if done.returncode == 0 else "no"
            print(f"{client:<21} {check:<22} {verdict:<5} {' '.join(said)}", flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where what is downloaded lies, 1.4 GB")
    sys.exit(main(parser.parse_args().folder.resolve()))
