"""Style and script of the page. Both are inlined: the page loads nothing."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1c1f23;--soft:#5b6470;--line:#d9dde2;--card:#fff;--accent:#0b57d0;
--bad:#b3261e;--good:#146c2e;--c0:#1f6feb;--c1:#d1242f;--c2:#1a7f37;--c3:#9a6700;--c4:#8250df;--c5:#0a7f8c;--c6:#bf3989;--c7:#6e7781}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e8eaed;--soft:#a2abb6;--line:#343a41;--card:#1c2024;
--accent:#8ab4f8;--bad:#f28b82;--good:#81c995;--c0:#6ea8fe;--c1:#ff7b72;--c2:#56d364;--c3:#e3b341;--c4:#c297ff;--c5:#56d4dd;--c6:#ff9bce;--c7:#9ea7b3}}
*{box-sizing:border-box}
a{color:var(--accent)}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
header,main,nav{max-width:1500px;margin:0 auto;padding:0 16px}
header{padding-top:14px}
h1{font-size:20px;margin:0 0 4px}h2{font-size:17px;margin:24px 0 8px}h3{font-size:15px;margin:16px 0 6px}
p{margin:6px 0}.note,.soft{color:var(--soft);font-size:13px}
nav{position:sticky;top:0;background:var(--bg);z-index:2;border-bottom:1px solid var(--line);padding-top:6px}
[role=tablist]{display:flex;gap:2px;overflow-x:auto}
[role=tab]{border:0;background:none;color:var(--fg);font:inherit;padding:8px 12px;border-bottom:3px solid transparent;cursor:pointer;white-space:nowrap}
[role=tab][aria-selected=true]{border-color:var(--accent);color:var(--accent);font-weight:600}
:focus-visible{outline:2px solid var(--accent);outline-offset:-2px}
[role=tabpanel]{padding:4px 0 60px}
.js [role=tabpanel][hidden]{display:none}
.state{font-weight:600}.bad{color:var(--bad)}.good{color:var(--good)}
.bar{height:10px;background:var(--line);border-radius:5px;overflow:hidden;margin:8px 0}.bar i{display:block;height:100%;background:var(--accent)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:8px 20px;margin:8px 0}
dt{color:var(--soft);font-size:13px}dd{margin:0;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(520px,100%),1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;min-width:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px}figcaption b{font-size:15px}
figcaption i{display:inline-block;width:14px;height:4px;border-radius:2px;background:var(--c);margin-right:5px;vertical-align:middle}
.chart{display:grid;grid-template-columns:56px 1fr;margin-top:6px;position:relative}
.plot{height:220px;position:relative}.plot svg{width:100%;height:100%;display:block;overflow:hidden}
.left,.below{position:relative;font-size:12px;color:var(--soft);font-variant-numeric:tabular-nums}
.left span{position:absolute;right:8px;transform:translateY(50%)}
.left span,.below span{white-space:nowrap}
.below{grid-column:2;height:20px}.below span{position:absolute;top:3px;transform:translateX(-50%)}.below .end{transform:translateX(-90%)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
svg .grid{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
svg .mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:4 4;vector-effect:non-scaling-stroke}
svg .line{fill:none;stroke:var(--c);stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
svg .dots{fill:none;stroke:var(--c);stroke-width:7;stroke-linecap:round;vector-effect:non-scaling-stroke}
svg .spread{fill:var(--c);opacity:.25}svg .faint{opacity:.35;stroke-width:1}figcaption .faint i{opacity:.35}svg .area{fill:var(--c);opacity:.75}
.tip{position:absolute;top:0;pointer-events:none;background:var(--card);border:1px solid var(--line);border-radius:6px;padding:4px 8px;font-size:12px;z-index:1;white-space:nowrap}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);pointer-events:none}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card);max-width:100%}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:5px 10px;border-bottom:1px solid var(--line);vertical-align:top;min-width:100px}th.n,td.n{min-width:0}
th{font-weight:600;color:var(--soft);white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pager{display:flex;gap:8px;align-items:center;margin:8px 0;font-size:14px}
button.plain{font:inherit;padding:4px 12px;border:1px solid var(--line);border-radius:6px;background:var(--card);color:var(--fg);cursor:pointer}
button.plain:disabled{opacity:.4;cursor:default}
.clips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:14px}
.clip{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:8px;min-width:0}
.clip img{width:100%;height:auto;max-height:200px;object-fit:contain;display:block;background:var(--line)}
.clip p{font-size:13px;margin:4px 0}.clip .caption{display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;overflow:hidden}
.run{display:flex;gap:12px;overflow-x:auto;padding:2px 2px 8px}
.run>div{flex:0 0 auto;width:260px;max-width:80vw}.run video,.run img{width:100%;max-height:260px;object-fit:contain;background:var(--line);display:block;border-radius:6px}
pre{white-space:pre-wrap;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;font-size:13px;max-height:340px;overflow:auto}
"""

SCRIPT = """
"use strict";
document.documentElement.classList.add("js");
const all = (selector, root) => Array.from((root || document).querySelectorAll(selector));
const make = (name, text, kind) => { const e = document.createElement(name); e.textContent = text || ""; if (kind) e.className = kind; return e; };

// tabs: arrow keys, Home and End move, as in the ARIA pattern; the address keeps the open one for a reload
const tabs = all("[role=tab]");
function open(tab, focus, first) {
  for (const other of tabs) {
    const on = other === tab, panel = document.getElementById(other.getAttribute("aria-controls"));
    other.setAttribute("aria-selected", on);
    other.tabIndex = on ? 0 : -1;
    panel.hidden = !on;
    if (!on) all("video", panel).forEach(v => v.pause());
  }
  if (focus) tab.focus();
  if (!first) tab.scrollIntoView({ block: "nearest", inline: "center" });
  const panel = document.getElementById(tab.getAttribute("aria-controls"));
  fillClips(panel);
  if (!first) try { history.replaceState(null, "", "#tab=" + tab.id); } catch (e) { location.hash = "tab=" + tab.id; }
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", e => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    open(tabs[(to + tabs.length) % tabs.length], true);
  });
});

// clips: their bytes are in the page; a video gets them when its tab is opened
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
function fillClips(panel) {
  for (const video of all("video[data-clip]", panel)) {
    const bytes = Uint8Array.from(atob(video.dataset.clip), c => c.charCodeAt(0));
    video.removeAttribute("data-clip");
    video.src = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    for (const name of ["pointerenter", "focus"]) video.addEventListener(name, () => { video.controls = true; });
    for (const name of ["pointerleave", "blur"]) video.addEventListener(name, () => { video.controls = false; });
  }
  if (!still) playAll(panel);
}
function playAll(panel) {
  for (const video of all("video", panel)) { video.currentTime = 0; video.play().catch(() => {}); }
}
for (const button of all("[data-play]")) {
  button.addEventListener("click", () => {
    const panel = button.closest("[role=tabpanel]"), videos = all("video", panel);
    if (button.dataset.play === "pause") videos.forEach(v => v.pause()); else playAll(panel);
  });
}

// pages of long lists
for (const list of all(".pages")) {
  const size = Number(list.dataset.size), items = Array.from(list.children), count = Math.ceil(items.length / size);
  if (count < 2) continue;
  const pager = make("div", "", "pager"), back = make("button", "Previous", "plain"), next = make("button", "Next", "plain"), where = make("span");
  where.setAttribute("aria-live", "polite");
  back.type = next.type = "button";
  let page = 0;
  const show = to => {
    page = Math.min(Math.max(to, 0), count - 1);
    items.forEach((item, i) => { item.hidden = Math.floor(i / size) !== page; });
    back.disabled = page === 0; next.disabled = page === count - 1;
    where.textContent = `${page * size + 1} to ${Math.min((page + 1) * size, items.length)} of ${items.length}`;
  };
  back.addEventListener("click", () => show(page - 1));
  next.addEventListener("click", () => show(page + 1));
  pager.append(back, next, where);
  const box = list.closest(".wide") || list;
  box.before(pager);
  show(0);
}

// charts: the values at the pointer, or at the cursor that the arrow keys move
for (const chart of all(".chart")) {
  const curves = JSON.parse(chart.dataset.curves), plot = chart.querySelector(".plot"), low = Number(chart.dataset.low), high = Number(chart.dataset.high);
  if (!curves.length) continue;
  const tip = make("div", "", "tip"), cursor = make("div", "", "cursor");
  tip.hidden = cursor.hidden = true;
  plot.append(cursor, tip);
  plot.tabIndex = 0;
  const steps = curves.reduce((a, c) => c.x.length > a.length ? c.x : a, []);
  let at = steps.length - 1;
  const near = (x, to) => { let b = 0; for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - to) < Math.abs(x[b] - to)) b = i; return b; };
  const show = index => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const share = (steps[at] - low) / (high - low || 1);
    cursor.style.left = `${100 * share}%`;
    tip.replaceChildren(make("b", `step ${Math.round(steps[at])}`), ...curves.map(c => make("div", `${c.label}: ${c.y[near(c.x, steps[at])]}`)));
    tip.style.left = share > 0.5 ? "" : `calc(${100 * share}% + 8px)`;
    tip.style.right = share > 0.5 ? `calc(${100 * (1 - share)}% + 8px)` : "";
    tip.hidden = cursor.hidden = false;
  };
  const hide = () => { tip.hidden = cursor.hidden = true; };
  plot.addEventListener("pointermove", e => {
    const box = plot.getBoundingClientRect();
    show(near(steps, low + (e.clientX - box.left) / box.width * (high - low)));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", e => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (by) { e.preventDefault(); show(tip.hidden ? at : at + by); } else if (e.key === "Escape") hide();
  });
}

// copy buttons
for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
    catch (e) { const range = document.createRange(); range.selectNodeContents(text); getSelection().removeAllRanges(); getSelection().addRange(range); button.textContent = "Selected: copy it with Ctrl-C"; }
  });
}

// a page that is old although the run should write it again
const written = document.querySelector("[data-written]");
if (written) {
  const old = Date.now() / 1000 - Number(written.dataset.written);
  if (written.dataset.state === "running" && old > 600) written.append(make("b", ` (${Math.round(old / 60)} minutes ago: reload the page; if this stays, the run has ended without writing its status)`, "bad"));
}
open(tabs.find(t => "#tab=" + t.id === location.hash) || tabs[0], false, true);
"""


def content_policy() -> str:
    """Return the content security policy: the page runs this script alone, and loads nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    sources = {
        "default-src": "'none'", "img-src": "data:", "media-src": "blob: data:", "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    return "; ".join(f"{name} {source}" for name, source in sources.items())
