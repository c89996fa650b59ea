"""The style sheet of reports and notebook views, and the one script of a report."""

STYLE = """
.alpa { color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --faint: #5b6470; --rule: #d5dae1; --panel: #f5f7f9;
  --accent: #0b57d0; --focus: #b3261e;
  --compute: #3b6fb6; --forward: #3b6fb6; --backward: #d07c1f; --weight: #b59a1d;
  --communication: #8a4fa8; --update: #2f8f5b; --bubble: #e3e6ea; --limit: #b3261e;
  --part0: #3b6fb6; --part1: #d07c1f; --part2: #2f8f5b; --part3: #8a4fa8; --part4: #b59a1d;
  --part5: #5f9ea0; --chip: #e4ecf7; }
@media (prefers-color-scheme: dark) { .alpa {
  --paper: #14171b; --ink: #e6e9ed; --faint: #a3acb8; --rule: #363c44; --panel: #1c2026;
  --accent: #8ab4f8; --focus: #f2b8b5;
  --compute: #6f9fe0; --forward: #6f9fe0; --backward: #e79a48; --weight: #d0b842;
  --communication: #b884d4; --update: #5dba87; --bubble: #2b3038; --limit: #f2b8b5;
  --part0: #6f9fe0; --part1: #e79a48; --part2: #5dba87; --part3: #b884d4; --part4: #d0b842;
  --part5: #7fc1c3; --chip: #253247; } }
.alpa { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
.alpa * { box-sizing: border-box; }
body.alpa { margin: 0; overflow-wrap: anywhere; }
body.alpa > header, body.alpa > nav, body.alpa > main, body.alpa > footer {
  max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
.alpa h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.2rem 0 .2rem; }
.alpa h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
.alpa h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.alpa section { padding: 1.2rem 0; border-top: 1px solid var(--rule); }
.alpa p { margin: .3rem 0 .6rem; max-width: 60rem; }
.alpa .faint { color: var(--faint); }
.alpa a { color: var(--accent); }
.alpa :focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
.alpa .skip { position: absolute; left: -100rem; }
.alpa .skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .3rem .6rem; }
.alpa nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0;
  margin: .6rem 0 1rem; }
.alpa .figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
  gap: .6rem; margin: .8rem 0; padding: 0; list-style: none; }
.alpa .figures li { background: var(--panel); border-radius: .4rem; padding: .6rem .8rem; }
.alpa .figures b { display: block; font-size: 1.25rem; font-weight: 600; }
.alpa .figures span { color: var(--faint); font-size: .9rem; }
.alpa dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .15rem 1rem;
  margin: .4rem 0; }
.alpa dt { color: var(--faint); } .alpa dd { margin: 0; }
.alpa .scroll { overflow-x: auto; max-width: 100%; }
.alpa .tall { max-height: 32rem; overflow-y: auto; }
.alpa table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.alpa caption { text-align: left; color: var(--faint); padding: .2rem 0; }
.alpa th, .alpa td { text-align: left; padding: .22rem .7rem .22rem 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: normal; }
.alpa th { font-weight: 600; white-space: nowrap; }
.alpa .number { text-align: right; white-space: nowrap; }
.alpa code, .alpa .path { font-family: ui-monospace, monospace; font-size: .88em; }
.alpa .path { display: inline-block; overflow-wrap: anywhere; min-width: 11rem; }
.alpa code { white-space: nowrap; }
.alpa .chip { display: inline-block; background: var(--chip); border-radius: .25rem;
  padding: 0 .35rem; margin: 0 .15rem .1rem 0; font-family: ui-monospace, monospace;
  font-size: .85em; white-space: nowrap; }
.alpa .chip.whole { background: none; color: var(--faint); }
.alpa svg { display: block; width: 100%; }
.alpa svg.bar { height: 1.4rem; border-radius: .2rem; background: var(--bubble); }
.alpa svg.track { height: 1.3rem; background: var(--bubble); }
.alpa svg.area { height: 11rem; background: var(--panel); }
.alpa .row { display: grid; grid-template-columns: 8.5rem 1fr; gap: .5rem; align-items: center;
  margin: .15rem 0; }
.alpa .track-name { font-size: .85rem; text-align: right; line-height: 1.15; }
.alpa .scale { display: flex; justify-content: space-between; font-size: .8rem;
  color: var(--faint); margin-left: 9rem; }
.alpa .scale.flush { margin-left: 0; }
.alpa #layout-count { margin-left: .6rem; }
.alpa .area-top { font-size: .8rem; color: var(--faint); }
.alpa .legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0;
  margin: .4rem 0; font-size: .88rem; }
.alpa .swatch { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: .15rem; }
.alpa input[type=search] { font: inherit; width: 100%; max-width: 32rem; padding: .4rem .6rem;
  color: inherit; background: var(--paper); border: 1px solid var(--faint);
  border-radius: .3rem; }
.alpa summary { cursor: pointer; }
.alpa pre { overflow-x: auto; background: var(--panel); padding: .6rem; font-size: .85rem; }
.alpa [hidden] { display: none; }
.alpa .limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 6 4;
  vector-effect: non-scaling-stroke; }
@media (max-width: 36rem) {
  .alpa .row { grid-template-columns: 1fr; gap: 0; }
  .alpa .track-name { text-align: left; }
  .alpa .scale { margin-left: 0; }
  .alpa dl { grid-template-columns: 1fr; gap: 0; } .alpa dd { margin: 0 0 .4rem; } }
@media print { .alpa .tall { max-height: none; } .alpa nav { display: none; } }
""" + "\n".join(
    f".alpa .c-{name} {{ fill: var(--{name}); background: var(--{name}); }}"
    for name in (
        "compute", "forward", "backward", "weight", "communication", "update", "bubble", "limit",
        *(f"part{i}" for i in range(6)),
    )
)  # fmt: skip

SCRIPT = """
"use strict";
(() => {
  const field = document.getElementById("layout-search");
  const shown = document.getElementById("layout-count");
  const rows = [...document.querySelectorAll("#layouts tbody tr")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const search = () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(word => word);
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every(word => texts[i].includes(word));
      count += row.hidden ? 0 : 1;
    });
    shown.textContent = `${count} of ${rows.length}`;
  };
  field.addEventListener("input", search);
  field.addEventListener("keydown", event => {
    if (event.key === "Escape") { field.value = ""; search(); }
  });
  search();
})();
"""
