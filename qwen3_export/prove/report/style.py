"""The style sheet of report.html: colors for light, dark and paper, in one place."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2024; --soft: #5c6570; --rule: #d9dee3; --band: #f4f6f8;
  --good: #14713c; --bad: #b3201f; --doubt: #8a5a00; --heat: #b3201f;
  --c0: #0b6bb5; --c1: #c25700; --c2: #14804a; --c3: #a3308f; --c4: #806a00; --c5: #4d5bd1;
  --c6: #b02a4a; --c7: #4a6570; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e8ebee; --soft: #a3adb7; --rule: #343b42;
  --band: #1d2226; --good: #58c98b; --bad: #ff8a80; --doubt: #f0b84d; --heat: #ff8a80;
  --c0: #62b2f2; --c1: #ff9d52; --c2: #5dce92; --c3: #e58ad4; --c4: #d8bf45; --c5: #9aa5ff;
  --c6: #ff8fa6; --c7: #9fb9c4; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.verdict { display: inline-block; margin: 0; padding: .2rem .8rem; border: 2px solid currentColor; border-radius: .4rem;
  font-weight: 700; font-size: 1.1rem; }
.verdict.none { font-weight: 400; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 700; } .doubt { color: var(--doubt); }
.failures, .remarks { padding-left: 1.2rem; } .failures { color: var(--bad); }
.remarks { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child, .words { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
td.good, td.bad, td.doubt { position: sticky; right: 0; background: var(--paper); }
tbody th { font-weight: 600; } tbody tr:hover { background: var(--band); }
.charts { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.charts section { min-width: 0; } figure { margin: 0; max-width: 46rem; }
figcaption { color: var(--soft); font-size: .9rem; }
svg { width: 100%; min-width: 30rem; height: auto; }
svg text { fill: var(--ink); font-size: 14px; } svg text.small { fill: var(--soft);
  font-size: 13px; } .axis { stroke: var(--ink); } .grid { stroke: var(--rule); } .whisker { stroke: var(--ink); }
.line { fill: none; stroke-width: 2; } .heat { fill: var(--heat); }
.ring { fill: none; stroke: var(--ink); stroke-width: 2; }
.front { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
.fill.c0 { fill: var(--c0); } .fill.c1 { fill: var(--c1); } .fill.c2 { fill: var(--c2); } .fill.c3 { fill: var(--c3); }
.fill.c4 { fill: var(--c4); } .fill.c5 { fill: var(--c5); } .fill.c6 { fill: var(--c6); } .fill.c7 { fill: var(--c7); }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); } .line.c5 { stroke: var(--c5); }
.line.c6 { stroke: var(--c6); } .line.c7 { stroke: var(--c7); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #333; --rule: #999; --band: #fff;
  --good: #0d5a2d; --bad: #9b1413; --doubt: #6b4500; --heat: #9b1413; --c0: #0b5c9c; --c1: #a34900; --c2: #0e6439;
  --c3: #872676; --c4: #665500; --c5: #3c48b0; --c6: #8f1f3b; --c7: #3a4f58; }
  body { font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; } .charts { display: block; } svg { min-width: 0; }
  section { break-inside: avoid; } .wide { overflow: visible; }
  table { font-size: 8pt; white-space: normal; } th, td { padding-right: .4rem; } }
"""
