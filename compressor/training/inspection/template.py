"""The HTML and CSS of the page about a classifier. Values come in escaped, from `page`."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f6f8; --card: #fff; --text: #171a20; --quiet: #5b6270; --line: #dfe2e8;
  --right: 37 99 235; --wrong: 234 88 12; --right-text: #1d4ed8; --wrong-text: #b03c06;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1115; --card: #191c22; --text: #e8eaee; --quiet: #a0a7b4; --line: #2c313a;
    --right: 37 99 235; --wrong: 194 65 12; --right-text: #8fb4ff; --wrong-text: #ffa26b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem clamp(.75rem, 3vw, 2rem) 4rem; }
h1 { font-size: clamp(1.35rem, 4vw, 1.8rem); line-height: 1.2; margin: .5rem 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
h3 { font-size: .95rem; margin: 0 0 .25rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
.quiet { color: var(--quiet); }
section, .note {
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: 1rem clamp(.75rem, 2vw, 1.25rem); margin-top: 1rem;
}
.note { border-left: .3rem solid rgb(var(--wrong)); }
.numbers { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.numbers div {
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
  padding: .75rem 1rem;
}
.numbers dt { color: var(--quiet); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
.numbers .words { font-size: 1.05rem; line-height: 1.4; }
.numbers small { display: block; font-size: .8rem; color: var(--quiet); }
dl { margin: 0; }
.scroll { overflow: auto; max-height: 85vh; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th { font-weight: 500; }
thead th { position: sticky; top: 0; background: var(--card); z-index: 1; }
tbody th { position: sticky; left: 0; background: var(--card); text-align: left; }
thead td { position: sticky; left: 0; top: 0; background: var(--card); z-index: 2; }
.name {
  display: inline-block; max-width: min(11rem, 30vw); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: bottom;
}
.matrix td {
  text-align: center; padding: 0 .2rem; height: var(--cell); min-width: var(--cell);
  border: 1px solid var(--card); border-radius: 3px; background: rgb(var(--line));
}
.matrix tbody td:not([class]) { background: var(--page); }
.matrix .r { background: rgb(var(--right) / var(--v)); }
.matrix .w { background: rgb(var(--wrong) / var(--v)); }
.matrix thead .name { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; }
.matrix thead th { vertical-align: bottom; padding: .2rem 0; }
.matrix tbody th { padding-right: .5rem; }
.dense { font-size: 10px; line-height: 1; }
.dense tbody .name { max-width: min(11rem, 22vw); }
.dense tbody td {
  font-size: 0; padding: 0; max-width: var(--cell); border-width: .5px; border-radius: 1px;
}
.rows { width: 100%; font-size: clamp(.8rem, 3vw, .95rem); }
.rows .name {
  max-width: clamp(6rem, 20vw, 14rem); white-space: normal; overflow-wrap: break-word;
}
.rows th, .rows td {
  padding: .3rem clamp(.25rem, 1vw, .6rem); white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
.rows td, .rows thead th:not(:first-child) { text-align: right; }
.rows thead th:first-child { text-align: left; left: 0; z-index: 2; }
.bar {
  --share: calc(var(--v) * 100%);
  background: linear-gradient(
    to right, rgb(var(--right) / var(--tint, .28)) var(--share), transparent var(--share)
  ) no-repeat;
}
.rows .bar { --tint: .75; background-size: 100% 3px; background-position: bottom; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: flex-start; }
.beside > * { max-width: 100%; }
.mistakes { margin: 0; padding-left: 2rem; overflow-wrap: anywhere; }
.gallery {
  display: grid; gap: .75rem; margin-top: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr));
}
figure { margin: 0; border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
.pair { display: flex; gap: 2px; background: var(--line); }
.pair img { flex: 1 1 0; min-width: 0; width: 50%; height: auto; object-fit: contain; }
.pair img:only-child { width: 100%; max-height: 16rem; }
.pixels img { image-rendering: pixelated; }
figcaption { padding: .6rem .75rem; font-size: .85rem; overflow-wrap: anywhere; }
figcaption strong { display: block; font-size: .95rem; }
.is-right { color: var(--right-text); }
.is-wrong { color: var(--wrong-text); }
.guess { display: flex; justify-content: space-between; gap: .5rem; padding: 0 .3rem; }
"""

PAGE = """\
{% macro gallery(samples) %}
<div class="gallery">
{% for sample in samples %}
<figure>
<div class="pair{{ ' pixels' if sample.is_small }}">
<img src="{{ sample.picture }}" alt="Sample {{ sample.index }}: {{ sample.label }}" \
width="{{ sample.width }}" height="{{ sample.height }}">
{%- if sample.heat %}
<img src="{{ sample.heat }}" alt="Where the score of {{ sample.prediction }} depends on it" \
width="{{ sample.width }}" height="{{ sample.height }}">
{%- endif %}
</div>
<figcaption>
{% if sample.is_right %}
<strong class="is-right">✓ {{ sample.label }}</strong>
{% else %}
<strong class="is-wrong">✗ {{ sample.label }}, taken for {{ sample.prediction }}</strong>
{% endif %}
{% for guess in sample.guesses %}
<span class="guess bar" style="--v:{{ guess.share }}"><span>{{ guess.name }}</span>\
<span>{{ guess.percent }}</span></span>
{% endfor %}
<span class="quiet">loss {{ sample.loss }} · sample {{ sample.index }}</span>
</figcaption>
</figure>
{% endfor %}
</div>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<dl class="numbers">
{% for number in numbers %}
<div><dt>{{ number.name }}</dt><dd{% if number.is_words %} class="words"{% endif %}>\
{{ number.value }}<small>{{ number.detail }}</small></dd></div>
{% endfor %}
</dl>
{% for note in notes %}
<p class="note" role="note">{{ note }}</p>
{% endfor %}

<section>
<h2>What is taken for what</h2>
<p class="quiet">Labels in rows, predictions in columns: blue is right, orange is wrong, and the \
stronger the larger its part of the row.{{ matrix.remark }}</p>
<div class="beside">
<div class="scroll" role="region" aria-label="Confusion matrix" tabindex="0">
<table class="matrix{{ ' dense' if matrix.is_dense }}" style="--cell:{{ matrix.cell }}px">
<thead><tr><td></td>
{% for name in matrix.names %}
<th scope="col" title="{{ name }}"><span class="name">{{ name }}</span></th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in matrix.rows %}
<tr><th scope="row" title="{{ row.name }}"><span class="name">{{ row.name }}</span></th>
{%- for cell in row.cells -%}
{% if cell %}<td class="{{ cell.kind }}" style="--v:{{ cell.shade }}" \
title="{{ row.name }} → {{ cell.name }}: {{ cell.times }}">{{ cell.times }}</td>\
{% else %}<td></td>{% endif %}
{%- endfor -%}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<div>
{% if mistakes %}
<h3>Most frequent mistakes</h3>
<ol class="mistakes">
{% for mistake in mistakes %}
<li>{{ mistake.label }}, taken for {{ mistake.prediction }}: {{ mistake.times }} \
<span class="quiet">of {{ mistake.of }}</span></li>
{% endfor %}
</ol>
{% else %}
<p>No mistake was made.</p>
{% endif %}
</div>
</div>
</section>

<section>
<h2>Classes</h2>
<p class="quiet">The lowest F1 first. Precision: of what was predicted to be of the class, the \
part that is. Recall: of what is of the class, the part that was predicted to be. F1: their \
harmonic mean.</p>
<div class="scroll" role="region" aria-label="Classes" tabindex="0">
<table class="rows">
<thead><tr><th scope="col">Class</th><th scope="col">Samples</th><th scope="col">Precision</th>\
<th scope="col">Recall</th><th scope="col">F1</th></tr></thead>
<tbody>
{% for row in scores %}
<tr><th scope="row" title="{{ row.name }}"><span class="name">{{ row.name }}</span></th>\
<td>{{ row.samples }}</td>
{%- for part in row.parts %}
{% if part.percent %}<td class="bar" style="--v:{{ part.share }}">{{ part.percent }}</td>\
{% else %}<td><span class="quiet">–</span></td>{% endif %}
{%- endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% for part in galleries %}

<section>
<h2>{{ part.title }}</h2>
<p class="quiet">{{ part.text }}{{ map_text }}</p>
{{ gallery(part.samples) }}
</section>
{% endfor %}
</main>
</body>
</html>
"""
