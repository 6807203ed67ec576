"""The style sheet of the page. Colours are variables, once for light and once for dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fff; --card: #f6f7f9; --ink: #1f2328; --muted: #59636e; --edge: #d5dae1; --grid: #e3e7ec;
  --line1: #0072b2; --line2: #d55e00; --warn: #fff4e5; --warn-edge: #d55e00; --mark: #dceefb; --bar: #cfe3f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --card: #1a2029; --ink: #e6e9ee; --muted: #9aa5b1; --edge: #343d49; --grid: #2a323d;
    --line1: #56b4e9; --line2: #e69f00; --warn: #33260f; --warn-edge: #e69f00; --mark: #16384f; --bar: #1d4a68;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 0; }
p { margin: .5rem 0; }
a { color: var(--line1); }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.lead, .note, figcaption p, dt { color: var(--muted); }
.note, figcaption p { font-size: .9rem; }
nav a { display: inline-block; margin-right: 1rem; padding: .25rem 0; }
.warnings { margin: 1.25rem 0; padding: .75rem 1rem; background: var(--warn); border-left: 4px solid var(--warn-edge); }
.warnings ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.tiles { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin: 1.25rem 0; }
.tiles div { padding: .75rem 1rem; background: var(--card); border: 1px solid var(--edge); border-radius: .5rem; }
.tiles dt { font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.6rem; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .5rem; }
th, td { padding: .35rem .75rem .35rem .5rem; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid var(--edge); }
thead th { font-size: .85rem; color: var(--muted); white-space: nowrap; }
tbody th { font-weight: 400; }
.figures td, .figures thead th:not(:first-child) { text-align: right; white-space: nowrap; }
.figures tr.own > * { font-weight: 600; }
.results { table-layout: fixed; }
.results thead th:nth-child(2), .results thead th:nth-child(3) { width: 30%; }
.results thead th:nth-child(4) { width: 12%; }
.bar {
  background: linear-gradient(var(--bar), var(--bar)) no-repeat 0 / calc(var(--share) * (100% - 4.25rem)) 100%;
}
.settings td { font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.settings tbody th { font: .85rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.settings td:nth-child(2) { min-width: 7rem; }
mark { background: var(--mark); color: inherit; padding: 0 .2em; border-radius: .2em; }
.charts { display: grid; gap: 1.25rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); }
.more { margin: 1.75rem 0 .75rem; color: var(--muted); }
figure { margin: 0; }
.chart svg[role] { display: block; width: 100%; height: auto; }
.chart text { fill: var(--muted); font-size: 11px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; color: var(--muted); min-height: 1.4rem; }
.legend b { color: var(--ink); font-variant-numeric: tabular-nums; }
.key { width: 22px; height: 8px; margin-right: .3rem; }
.grid { stroke: var(--grid); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line1 { stroke: var(--line1); } .dot1 { fill: var(--line1); }
.line2 { stroke: var(--line2); stroke-dasharray: 5 3; } .dot2 { fill: var(--line2); }
.picture { margin: 1.5rem 0 2rem; }
.picture .wide { background: #fff; border: 1px solid var(--edge); border-radius: .5rem; padding: .5rem; }
.picture img { display: block; margin: 0 auto; max-width: 100%; min-width: min(38rem, var(--full)); height: auto; }
details { margin: 1rem 0; }
summary { cursor: pointer; padding: .25rem 0; }
footer { margin-top: 3rem; font-size: .85rem; color: var(--muted); }
@media (max-width: 40rem) {
  body { padding: 1rem .9rem 3rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 1.35rem; }
  .results { table-layout: auto; min-width: 0; }
  .results thead th:nth-child(n) { width: auto; }
  .bar { background: none; }
  th, td { padding: .35rem .4rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --edge: #bbb; --grid: #ddd;
    --line1: #0072b2; --line2: #d55e00; --warn: #fff; --warn-edge: #d55e00; --mark: #e3e3e3; --bar: #e3e3e3; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav { display: none; }
  .tiles div, .chart, .picture, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .picture img { min-width: 0; max-height: 22cm; }
  details::details-content { content-visibility: visible; display: block; }
  .bar, mark, .warnings { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
