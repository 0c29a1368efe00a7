"""What `edgecloud profile` measured, as files that stand for this device and that cloud where neither is at hand."""

from __future__ import annotations

from pathlib import Path

from edgecloud.bench_report import write_whole
from edgecloud.bundle import Bundle
from edgecloud.errors import ConfigError, ModelError
from edgecloud.partitioner.child import ChildError
from edgecloud.partitioner.fitted import fitted, ram_gb, spread_over_layers
from edgecloud.partitioner.layer_times import WEIGHT_BYTES, ModelShape
from edgecloud.partitioner.machine_profile import MachineProfile, Measured
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.node_times import measure_nodes
from edgecloud.profile import Profile

FORMATS = {"float32": "fp32", "bfloat16": "fp16", "float16": "fp16"}


def measured_device(bundle: Bundle, num_threads: int) -> MachineProfile:
    """The bundle's draft node by node, on this machine, in about half a minute.

    Raises:
        ModelError: the graph does not run, or is not named by layer.
    """
    graph = bundle.file(bundle.draft.model)
    try:
        times = measure_nodes(graph, num_threads=num_threads)
    except ChildError as error:
        raise ModelError(f"{graph} cannot be profiled: {error}") from error
    weights = bundle.draft.quantization
    fingerprint = bundle.draft.fingerprint
    measured = Measured(fingerprint, weights, times.context_tokens, times.rows, times.layer_ms, times.rest_ms)
    num_bytes = sum(info.num_bytes for name, info in bundle.files.items() if name.startswith(bundle.draft.model))
    source = f"measured with ONNX Runtime's profiler on {bundle.draft.name} {weights}, {num_threads} thread(s)"
    return fitted("this machine", int(num_bytes / WEIGHT_BYTES[weights]), measured, times.pass_ms, ram=ram_gb(), source=source)


def measured_cloud(bundle: Bundle, profile: Profile) -> MachineProfile:
    """The service's passes as it counts them, spread over the target's layers.

    Raises:
        ConfigError: no service was measured, or the bundle has no target whose layers could be counted.
    """
    cloud = profile.cloud
    if cloud is None:
        raise ConfigError("--save-cloud needs --cloud HOST:PORT: without it no service is measured")
    if bundle.target_folder is None or not bundle.target_folder.is_dir():
        raise ConfigError(f"--save-cloud needs the target's configuration, {bundle.path} has only the device's half")
    weights = FORMATS.get(bundle.target.dtype)
    if weights is None:
        raise ConfigError(f"--save-cloud knows no format for a target in {bundle.target.dtype}; it takes {', '.join(FORMATS)}")
    shape = ModelShape.of(ModelFolder.open(bundle.target_folder), bundle.target.fingerprint)
    passes = {seen.num_rows: seen.compute_ms for seen in cloud.passes}
    prompt_rows = int(cloud.prefill_tokens)
    if prompt_rows > max(passes):
        passes[prompt_rows] = cloud.prefill_ms.median
    rows = sorted(passes)
    pass_ms = [passes[count] for count in rows]
    measured = spread_over_layers(bundle.target.fingerprint, shape, weights, prompt_rows, rows, pass_ms)
    source = f"measured through the service at {profile.address}, {bundle.target.name} in {weights}"
    return fitted("the measured service", shape.num_weights, measured, pass_ms, ram=ram_gb(), source=source)


def write_profile(profile: MachineProfile, path: Path) -> None:
    """As JSON, whole or not at all. Raises ConfigError: it cannot be written there."""
    if path.suffix != ".json":
        raise ConfigError(f"{path} is written as JSON; give a name that ends in .json")
    try:
        write_whole(path, profile.to_json())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
