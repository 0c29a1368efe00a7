"""A plan on disk: plan.json with every figure, and plan.html that needs no other file."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment

from edgecloud.bench_report import write_whole
from edgecloud.partitioner.plan import Plan, shown
from edgecloud.partitioner.regions import MBPS, RTT_MS, over_links
from edgecloud.plan_plots import all_plots

CAPTIONS = {
    "cuts": "Time of a token by cut, each with the bits, codec and draft length that suit it best; other modes for comparison.",
    "regions": "Which plan wins, by round trip and bandwidth of the uplink.",
    "damage": "Rate against damage: what a boundary's bits cost on the wire, and in tokens that differ from the full target's.",
}

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>edgecloud plan: {{ plan.predictor.scene.target.name }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
figure { margin: 2em 0; } svg { width: 100%; height: auto; }
</style>
</head>
<body>
<h1>edgecloud plan: {{ plan.predictor.scene.target.name }}</h1>
{% for line in plan.conclusions() %}<p>{{ line }}</p>
{% endfor %}
<h2>For {{ plan.search.objective }}, over {{ plan.search.link.name }}</h2>
<table id="plans">
<tr><th>plan</th><th>TTFT ms</th><th>TPOT ms</th><th>cloud ms/token</th><th>passes/token</th><th>bytes up/token</th><th>RAM MB</th>
<th>J/token</th><th>loss</th><th>why not</th></tr>
{% for judged in shown %}{% set f = judged.figures %}
<tr><td>{{ judged.candidate }}</td><td>{{ "%.0f" | format(f.ttft_ms) }}</td><td>{{ "%.1f" | format(f.tpot_ms) }}</td>
<td>{{ "%.2f" | format(f.cloud_ms_per_token) }}</td><td>{{ "%.2f" | format(f.passes_per_token) }}</td>
<td>{{ "%.0f" | format(f.up_bytes_per_token) }}</td><td>{{ "%.0f" | format(f.device_ram_bytes / 1e6) }}</td>
<td>{{ "%.3f" | format(f.device_joules_per_token) }}</td><td>{{ "?" if f.loss is none else "%.2f" | format(f.loss) }}</td>
<td>{{ plan.search.why_not(judged) or "the plan" }}</td></tr>
{% endfor %}
</table>
{% for name, svg in plots.items() %}
<figure id="plot-{{ name }}">{{ svg | safe }}<figcaption>{{ captions[name] }}</figcaption></figure>
{% endfor %}
<h2>Assumptions</h2>
<ul>{% for line in plan.assumptions %}<li>{{ line }}</li>{% endfor %}</ul>
<p>{{ plan.search.judged | length }} candidates. Every figure: plan.json.</p>
</body>
</html>
"""


def write_plan(plan: Plan, folder: Path) -> tuple[Path, Path]:
    """-> the files plan.json and plan.html in `folder`, each new as a whole or not at all. Raises OSError."""
    page = to_html(plan)
    files = folder / "plan.json", folder / "plan.html"
    write_whole(files[0], json.dumps(plan.to_dict(), ensure_ascii=False, indent=1) + "\n")
    write_whole(files[1], page)
    return files


def to_html(plan: Plan) -> str:
    """The report as one page. Raises EdgecloudError: the library for the plots is missing."""
    search = plan.search
    places = over_links(plan.predictor, search.objective, search.constraints, RTT_MS, MBPS)
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(plan=plan, shown=shown(search), plots=all_plots(plan, places), captions=CAPTIONS)
