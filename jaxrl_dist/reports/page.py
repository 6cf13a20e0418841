"""The template of the page that `jaxrl-dist report` writes (jinja2, autoescaped)."""

PAGE = """\
{% macro estimated(it, digits) %}
{% if it is none %}&ndash;{% else %}
{{ number(it.value, digits) }}{% if it.low == it.low %}
 <span class="range">[{{ number(it.low, digits) }}, {{ number(it.high, digits) }}]</span>{% endif %}
{% endif %}
{% endmacro %}
{% macro named(label, detail) %}
<th scope="row">{{ label }}{% if detail %}<span class="detail">{{ detail }}</span>{% endif %}</th>
{% endmacro %}
{% macro matrix(cells, what, many) %}
<div class="box" role="region" aria-label="Probability of improvement, {{ what }}" tabindex="0">
<table>
<caption>Probability that a run of the row scores above a run of the column, {{ what }}; ties count half.
Bold: the 95 % interval does not hold 0.5.</caption>
<thead><tr><th scope="col">row over column</th>
{% for label in cells %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead>
<tbody>
{% for label, row in cells.items() %}
<tr>{{ named(label, "") }}
{% for it in row %}
{% if it is none %}<td class="none">&ndash;</td>
{% else %}<td style="--p: {{ '%.3f' % it.value }}" class="shaded{{ ' decided' if it.low > 0.5 or it.high < 0.5 }}">
{{ estimated(it, 2) }}</td>
{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if many %}<p class="small">{{ many }}</p>{% endif %}
{% endmacro %}
{% macro fields(rows, what) %}
<div class="box" role="region" aria-label="{{ what }}" tabindex="0">
<table class="fields">
<thead><tr><th scope="col">field</th>
{% for label, name in headers %}<th scope="col">{{ label }}<span class="detail">{{ name }}</span></th>
{% endfor %}</tr></thead>
<tbody>
{% for name, values in rows %}
<tr><th scope="row">{{ name }}</th>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Report: {{ runs | length }} runs, {{ environments | map(attribute="name") | join(", ") }}</title>
<style>
:root {
  color-scheme: light dark;
  --surface: #ffffff; --ink: #1f2328; --faint: #5f6670; --grid: #e5e7eb; --amiss: #fff4d6; --amiss-edge: #c98a00;
  --curve-0: #0072b2; --curve-1: #d55e00; --curve-2: #009e73; --curve-3: #cc79a7; --curve-4: #e69f00;
  --curve-5: #56b4e9; --curve-6: #4d4d4d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --surface: #15181d; --ink: #e6e8eb; --faint: #9aa3af; --grid: #2c323a; --amiss: #33290f; --amiss-edge: #d9a520;
    --curve-0: #3d9be0; --curve-1: #f0803c; --curve-2: #1fbf92; --curve-3: #de9bc0; --curve-4: #f0b429;
    --curve-5: #9ad8f7; --curve-6: #b5b5b5;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--surface); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
h1, h2, p, li, code { overflow-wrap: anywhere; }
p, ul { margin: .5rem 0; max-width: 48rem; }
.small, caption, figcaption, .detail, .range { font-size: .85rem; color: var(--faint); }
.amiss { background: var(--amiss); border-left: 4px solid var(--amiss-edge); padding: .5rem 1rem; margin: 1rem 0; }
.amiss h2 { border: 0; margin: 0; padding: 0; font-size: 1rem; }
.box { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
.box:focus-visible, summary:focus-visible { outline: 2px solid var(--curve-0); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { caption-side: bottom; text-align: left; padding: .4rem 0; max-width: calc(100vw - 2.5rem); }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap;
  vertical-align: top; }
th { font-weight: 600; }
tbody th, thead th:first-child, .fields td, .text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--surface); }
.fields thead th { text-align: left; }
.detail { display: block; font-weight: 400; white-space: normal; min-width: 8rem; overflow-wrap: anywhere; }
tbody th .detail { max-width: 14rem; }
.shaded { background: color-mix(in srgb, var(--curve-0) calc(var(--p) * 45%), transparent); }
.shaded .range { color: inherit; }
.decided { font-weight: 700; }
.none { text-align: center; color: var(--faint); }
figure { margin: .75rem 0; max-width: 40rem; }
svg { display: block; width: 100%; height: auto; }
details { margin: .75rem 0; }
summary { cursor: pointer; font-weight: 600; }
code { font-size: .85rem; }
</style>
</head>
<body>
<header>
<h1>{{ algorithms }} algorithm{{ "s" if algorithms != 1 }} on
{{ environments | map(attribute="name") | join(", ") }}</h1>
<p class="small">{{ runs | length }} run{{ "s" if runs | length != 1 }}; written {{ date }}</p>
</header>
<main>
{% if warnings %}
<section class="amiss" aria-label="Warnings">
<h2>Before you compare</h2>
<ul>
{% for warning in warnings %}<li>{{ warning }}</li>
{% endfor %}
</ul>
</section>
{% endif %}
<p>A score is the mean return of a seed's last evaluation. IQM is the interquartile mean over seeds, the mean of the
middle half. Brackets hold 95 % percentile bootstrap intervals (2,000 resamples of the seeds, of each environment
apart); with few seeds they are too narrow, and with one there is none. CVaR 10 % is the mean return of the worst tenth
of all episodes of the last evaluation. AUC is the area under a seed's learning curve over its env steps (trapezoids),
as a mean return, and then the IQM over seeds. The optimality gap is how much normalized scores miss 1 on average, more
than 1 counting as 1: lower is better. {{ normalization }}</p>
{% if details %}
<section>
<h2>Groups</h2>
<p>An algorithm with several settings on an environment has a number for each:</p>
<ul>
{% for label, detail in details.items() %}<li><strong>{{ label }}</strong>: {{ detail }}</li>
{% endfor %}
</ul>
</section>
{% endif %}

{% if over_all %}
<section>
<h2>{{ "All environments together" if environments | length > 1 else "Normalized scores" }}</h2>
{% for sentence in over_all.left_out %}<p class="small">{{ sentence }}</p>
{% endfor %}
{% if over_all.not_normalized %}
<p class="small">Without {{ over_all.not_normalized | join(", ") }}, where all seeds have the same final score, so that
there is nothing to normalize by.</p>
{% endif %}
{% if over_all.rows %}
<div class="box" role="region" aria-label="Normalized scores over environments" tabindex="0">
<table>
<caption>Normalized scores, pooled over {{ over_all.environments | join(", ") }}, best IQM first.</caption>
<thead><tr><th scope="col">algorithm</th><th scope="col">IQM</th><th scope="col">mean</th>
<th scope="col">optimality gap</th><th scope="col">seeds</th></tr></thead>
<tbody>
{% for row in over_all.rows %}
<tr>{{ named(row.label, row.detail) }}<td>{{ estimated(row.iqm, 3) }}</td><td>{{ estimated(row.mean, 3) }}</td>
<td>{{ estimated(row.gap, 3) }}</td><td>{{ row.seeds }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<figure>
{{ over_all.figure }}
<figcaption>Performance profile: the fraction of runs (seeds x {{ over_all.environments | join(", ") }}) with a
normalized score above τ; higher is better. Bands: pointwise 95 % stratified bootstrap. {{ normalization }}</figcaption>
</figure>
{% else %}
<p>No algorithm ran on all of these environments, so there is nothing to pool.</p>
{% endif %}
{% if over_all.matrix %}{{ matrix(over_all.matrix, "mean over all environments", over_all.many) }}{% endif %}
</section>
{% endif %}

{% for environment in environments %}
<section>
<h2>{{ environment.name }}</h2>
{% if environment.figure %}
<figure>
{{ environment.figure }}
<figcaption>{{ environment.caption }}</figcaption>
</figure>
{% else %}
<p>{{ environment.caption }}</p>
{% endif %}
<div class="box" role="region" aria-label="Final scores on {{ environment.name }}" tabindex="0">
<table>
<caption>Final scores, best IQM first. {{ environment.scale }}</caption>
<thead><tr><th scope="col">algorithm</th><th scope="col">IQM</th><th scope="col">median</th><th scope="col">mean</th>
<th scope="col">CVaR 10 %</th><th scope="col">AUC</th><th scope="col">optimality gap</th>
<th scope="col">seeds</th>{% if environment.any_diverged %}<th scope="col">diverged</th>{% endif %}
<th scope="col">env steps</th></tr></thead>
<tbody>
{% set digits = environment.digits %}
{% for row in environment.rows %}
<tr>{{ named(row.label, row.detail) }}<td>{{ estimated(row.iqm, digits) }}</td><td>{{ number(row.median, digits) }}</td>
<td>{{ number(row.mean, digits) }}</td><td>{{ number(row.cvar, digits) }}</td><td>{{ estimated(row.area, digits) }}</td>
<td>{{ estimated(row.gap, 3) }}</td><td>{{ row.seeds }}</td>
{% if environment.any_diverged %}<td>{{ row.diverged }}</td>{% endif %}
<td>{{ row.env_steps }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if environment.matrix %}{{ matrix(environment.matrix, "on " ~ environment.name, environment.many) }}{% endif %}
</section>
{% endfor %}

<section>
<h2>Time</h2>
<div class="box" role="region" aria-label="Time" tabindex="0">
<table>
<caption>Training seconds are those of the metrics, without compiling and evaluating; wall seconds are of the whole run,
where they were recorded. Rates are those of all seeds of a run together.</caption>
<thead><tr><th scope="col">algorithm</th><th scope="col" class="text">environment</th><th scope="col">seeds</th>
<th scope="col">env steps</th><th scope="col">training seconds</th><th scope="col">wall seconds</th>
<th scope="col">env steps/s</th><th scope="col">updates/s</th><th scope="col">devices</th></tr></thead>
<tbody>
{% for run in runs %}
<tr>{{ named(run.label, "") }}<td class="text">{{ run.environment }}</td><td>{{ run.seeds }}</td>
<td>{{ number(run.env_steps, 0) }}</td><td>{{ number(run.seconds, 1) }}</td><td>{{ number(run.wall, 0) }}</td>
<td>{{ number(run.steps, 0) }}</td><td>{{ number(run.updates, 0) }}</td><td>{{ run.device }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>

<section>
<h2>Settings</h2>
{% if runs | length == 1 %}
<p>There is one run; all of its settings are below.</p>
{% elif differing %}
<p>Fields in which the runs differ; &ndash; where a run has no such field.</p>
{{ fields(differing, "Settings that differ") }}
{% else %}
<p>The runs do not differ in their settings.</p>
{% endif %}
<details>
<summary>All {{ settings | length }} fields</summary>
{{ fields(settings, "All settings") }}
</details>
<details>
<summary>Versions and devices</summary>
{{ fields(versions, "Versions and devices") }}
</details>
</section>

<section>
<h2>Runs</h2>
<div class="box" role="region" aria-label="Runs" tabindex="0">
<table class="fields">
<thead><tr><th scope="col">algorithm</th><th scope="col">environment</th><th scope="col">run</th>
<th scope="col">started</th><th scope="col">command</th></tr></thead>
<tbody>
{% for run in runs %}
<tr>{{ named(run.label, "") }}<td>{{ run.environment }}</td><td>{{ run.name }}</td><td>{{ run.date }}</td>
<td><code>{{ run.command }}</code></td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="small">This page was written by <code>{{ command }}</code></p>
</section>
</main>
</body>
</html>
"""
