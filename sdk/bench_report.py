"""A bench on disk: bench.json with every raw sample, and report.html that needs no other file."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from jinja2 import Environment

from edgecloud.bench import Bench
from edgecloud.drawing import check_installed
from edgecloud.errors import ConfigError
from edgecloud.plots import all_plots

CAPTIONS = {
    "tpot": "TPOT by round trip and mode. Medians over the generations, bars from the lower to the upper quartile.",
    "ttft": "Time to the first token. Medians. Before the first final token, mode auto shows the device's guesses.",
    "acceptance": "Acceptance by position of the draft.",
    "timeline": "What mode auto did, token by token.",
}

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>edgecloud bench: {{ bench.bundle }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
figure { margin: 2em 0; } svg { width: 100%; height: auto; } .no { color: #b00; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>edgecloud bench: {{ bench.bundle }}</h1>
<p>{{ bench.machine.date }}, {{ bench.machine.cpu }},
{% if bench.cloud_cpu is not none %}service on core {{ bench.cloud_cpu }}, device on core {{ bench.device_cpu }}{% else
%}service and device not pinned{% endif %}; one thread each. {{ bench.prompts | length }} prompts,
{{ bench.max_new_tokens }} tokens, greedy, {{ bench.repeats }} generation(s) of each.<br><code>{{ bench.command }}</code></p>
<p id="identity">{% if bench.identical %}Every verified answer has the token ids of mode <code>cloud</code>.{% else
%}<strong class="no">Not every verified answer has the token ids of mode <code>cloud</code>: see the last column.</strong>
{% endif %} The service says <code>exact: {{ bench.exact }}</code>.</p>
{% for name, svg in plots.items() %}
<figure id="plot-{{ name }}">{{ svg | safe }}<figcaption>{{ captions[name.partition("-")[0]] }}</figcaption></figure>
{% endfor %}
<h2>Regret of mode auto</h2>
{% if bench.regrets %}
<p>Time for all prompts, against that of the mode and draft length that turned out best on that link.</p>
<table id="regret">
<tr><th>link</th><th>mode</th><th>total, ms</th><th>best fixed</th><th>its total, ms</th><th>ratio</th></tr>
{% for row in bench.regrets %}
<tr><td>{{ row.link }}</td><td>{{ row.arm }}</td><td>{{ "%.0f" | format(row.total_ms) }}</td><td>{{ row.best }}</td>
<td>{{ "%.0f" | format(row.best_ms) }}</td><td>{{ "%.3f" | format(row.ratio) }}</td></tr>
{% endfor %}
</table>
{% else %}<p>Mode auto was not measured.</p>{% endif %}
<h2>All of it</h2>
<table id="cells">
<tr><th>link</th><th>mode</th><th>RTT ms</th><th>first visible ms</th><th>TTFT ms</th><th>TPOT ms</th><th>total ms</th>
<th>accepted</th><th>passes/token</th><th>bytes up/token</th><th>taken back/token</th><th>identical to cloud</th></tr>
{% for cell in bench.cells %}
<tr><td>{{ cell.link }}</td><td>{{ cell.arm }}</td>
<td>{{ "-" if cell.rtt_ms is none else "%.1f" | format(cell.rtt_ms) }}</td>
<td>{{ "%.0f" | format(cell.first_visible_ms) }}</td><td>{{ "%.0f" | format(cell.ttft_ms) }}</td>
<td>{{ "%.1f" | format(cell.tpot_ms) }}</td><td>{{ "%.0f" | format(cell.total_ms) }}</td>
<td>{{ "-" if cell.acceptance_rate is none else "%.0f %%" | format(100 * cell.acceptance_rate) }}</td>
<td>{{ "%.2f" | format(cell.target_passes_per_token) }}</td><td>{{ "%.1f" | format(cell.uplink_bytes_per_token) }}</td>
<td>{{ "%.2f" | format(cell.retracted_per_token) }}</td>
<td{% if cell.verified and not cell.identical %} class="no"{% endif %}>{{ cell.num_identical }} of {{ cell.num_samples }}
{%- if not cell.verified %} (unverified){% endif %}</td></tr>
{% endfor %}
</table>
<p>Versions: {% for name, version in bench.machine.versions.items() %}{{ name }} {{ version }}, {% endfor %}
Python {{ bench.machine.python }}, {{ bench.machine.system }}. Raw samples: bench.json.</p>
</body>
</html>
"""


def prepare_folder(folder: Path, option: str = "-o") -> None:
    """Make the report's folder, before hours of measuring are lost for want of it.

    Raises:
        ConfigError: it cannot be made or written to.
        EdgecloudError: the library for the plots is missing.
    """
    check_installed(option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be written to: {error.strerror}; give a folder that can") from error


def write_report(bench: Bench, folder: Path) -> tuple[Path, Path]:
    """-> the files bench.json and report.html in `folder`, each new as a whole or not at all. Raises OSError."""
    page = to_html(bench)
    files = folder / "bench.json", folder / "report.html"
    write_whole(files[0], json.dumps(bench.to_dict(), ensure_ascii=False, indent=1) + "\n")
    write_whole(files[1], page)
    return files


def to_html(bench: Bench) -> str:
    """The report as one page. Raises EdgecloudError: the library for the plots is missing."""
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(bench=bench, plots=all_plots(bench), captions=CAPTIONS)


def write_whole(path: Path, text: str) -> None:
    """Replace a file by another in one step. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
