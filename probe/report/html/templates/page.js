"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, name, text) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const data = (id) => { const found = $(id); return found ? JSON.parse(found.textContent) : null; };
  const number = (x, digits = 3) => x === null || x === undefined ? "not known" : (x === 0 ? "0" :
    (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? x.toExponential(digits - 1).replace(/e([-+])(\d)$/, "e$10$2") : String(Number(x.toPrecision(digits)))));
  const signed = (x) => x > 0 ? "+" + number(x) : number(x);

  // ---- light and dark
  const theme = $("theme");
  const dark = () => (document.documentElement.dataset.theme ||
    (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const showTheme = () => theme.setAttribute("aria-pressed", String(dark()));
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; showTheme(); });
  showTheme();

  // ---- tables that can be sorted: by the first number of a cell, with the power of ten behind a bracket
  const value = (cell) => {
    const text = cell.textContent.trim();
    const found = /^[[(]?([-+\u2212]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)[^)\]]*[\])]?(?:e([-+]?\d+))?/i.exec(text);
    if (!found) return text ? text.toLowerCase() : null;
    const power = /^[[(]/.test(text) && found[2] ? Number(found[2]) : 0;
    return Number(found[1].replace(/,/g, "").replace("\u2212", "-")) * 10 ** power;
  };
  const compared = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  const sortable = (table) => {
    for (const button of table.querySelectorAll("thead .sort")) {
      const head = button.closest("th"), row = head.parentElement, at = [...row.children].indexOf(head);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") !== "descending" && (at > 0 || head.hasAttribute("aria-sort"));
        for (const other of row.children) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const keyed = [...body.rows].map((one, k) => [value(one.children[at]), k, one]);
        keyed.sort(([a, i], [b, j]) => (a === null) - (b === null) || (down ? compared(b, a) : compared(a, b)) || i - j);
        body.append(...keyed.map((one) => one[2]));
      });
    }
  };
  document.querySelectorAll("table.sortable").forEach(sortable);
  for (const table of document.querySelectorAll("table.plot:not(.sortable)"))
    for (const button of table.querySelectorAll(".sort")) button.replaceWith(button.textContent);

  // ---- responses with their tokens
  const U = data("response-data");
  if (U) responses(U);
  function responses(U) {
    const PAGE = 20, FIRST_TOKENS = 1500;
    const list = $("list"), reading = $("reading"), more = $("more"), found = $("found");
    const find = $("find"), order = $("order"), side = $("side");
    let chosen = [], shown = 0;
    const keys = {
      size: (r) => -Math.abs(r.contribution), falls: (r) => r.contribution, rises: (r) => -r.contribution,
      index: (r) => r.i, advantage: (r) => -(r.advantage ?? -Infinity), entropy: (r) => -(r.entropy ?? -Infinity), length: (r) => -r.n,
    };
    const sides = {
      all: () => true, positive: (r) => r.advantage > 0, negative: (r) => r.advantage < 0, zero: (r) => !r.advantage,
      falls: (r) => r.contribution < 0, rises: (r) => r.contribution > 0,
    };
    const textOf = (r) => (r.whole ??= (r.t ? r.t.map((k) => U.texts[k]).join("") : r.text || "").toLowerCase());
    const promptOf = (r) => r.p === undefined ? "" : U.prompts[r.p];
    const words = (r, k) => {
      const parts = [`response ${r.i}, token ${k}`];
      if (r.t) parts.push(JSON.stringify(U.texts[r.t[k]]));
      if (r.c) parts.push(`${signed(r.c[k])} nats per token to deltaH1`);
      if (r.r) parts.push(`${signed(r.r[k])} to the expected reward`);
      if (r.l) parts.push(`probability ${number(Math.exp(r.l[k]))}`);
      if (r.h) parts.push(`entropy ${number(r.h[k])} nats`);
      parts.push(`advantage ${number(r.advantage)}`);
      return parts.join("; ");
    };
    const shade = (span, c) => {
      if (!c || !U.largest) return;
      // the square root lets the many small contributions be seen beside the few large ones
      const strength = Math.round(8 + 52 * Math.sqrt(Math.abs(c) / U.largest));
      const tone = c > 0 ? "shade-rises" : "shade-falls";
      span.style.background = `color-mix(in srgb, var(--${tone}) ${strength}%, transparent)`;
      span.style.borderBottom = `2px ${c > 0 ? "solid" : "dashed"} color-mix(in srgb, var(--${tone}) ${Math.min(100, strength + 25)}%, transparent)`;
    };
    const glyph = (text) => text === "" ? "\u2205" : text.replace(/\n/g, "\u21b5\n");
    function tokens(r) {
      const box = make("div", "text");
      const name = `Tokens of response ${r.i}`;
      if (!r.t && !r.c) { box.textContent = r.text ?? ""; box.tabIndex = 0; box.setAttribute("role", "group"); box.setAttribute("aria-label", name); return box; }
      const count = (r.t || r.c).length;
      box.tabIndex = 0;
      box.setAttribute("role", "listbox");
      box.setAttribute("aria-label", name);
      box.setAttribute("aria-orientation", "horizontal");
      let current = -1, upto = 0;
      const extend = (to) => {
        const part = document.createDocumentFragment();
        for (; upto < Math.min(to, count); upto++) {
          const span = make("span", "token", r.t ? glyph(U.texts[r.t[upto]]) : ` ${upto}`);
          span.id = `t${r.i}-${upto}`;
          span.dataset.k = upto;
          span.setAttribute("role", "option");
          span.setAttribute("aria-selected", "false");
          if (r.c) shade(span, r.c[upto]);
          part.append(span);
        }
        box.append(part);
      };
      const choose = (k, scroll) => {
        if (k >= upto) extend(k + 1);
        const before = box.querySelector(".current");
        if (before) { before.classList.remove("current"); before.setAttribute("aria-selected", "false"); }
        current = k;
        const span = box.querySelector(`[data-k="${k}"]`);
        span.classList.add("current");
        span.setAttribute("aria-selected", "true");
        box.setAttribute("aria-activedescendant", span.id);
        reading.textContent = words(r, k);
        if (scroll) span.scrollIntoView({ block: "nearest" });
      };
      extend(FIRST_TOKENS);
      box.addEventListener("mouseover", (event) => { const k = event.target.dataset?.k; if (k !== undefined) choose(Number(k), false); });
      box.addEventListener("click", (event) => { const k = event.target.dataset?.k; if (k !== undefined) choose(Number(k), false); });
      box.addEventListener("focus", () => { if (current < 0 && count) choose(0, false); });
      box.addEventListener("keydown", (event) => {
        const to = { ArrowRight: current + 1, ArrowDown: current + 1, ArrowLeft: current - 1, ArrowUp: current - 1, Home: 0, End: count - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        choose(Math.max(0, Math.min(count - 1, to)), true);
      });
      if (count > upto) {
        const rest = make("button", "", `Show the other ${(count - upto).toLocaleString("en")} tokens`);
        rest.type = "button";
        rest.addEventListener("click", () => { extend(count); rest.remove(); box.focus(); });
        const both = make("div");
        both.append(box, rest);
        return both;
      }
      return box;
    }
    function table(r) {
      const names = [["token", (k) => k], ["text", r.t && ((k) => JSON.stringify(U.texts[r.t[k]]))], ["deltaH1, nats per token", r.c && ((k) => number(r.c[k], 4))],
        ["expected reward", r.r && ((k) => number(r.r[k], 4))], ["probability", r.l && ((k) => number(Math.exp(r.l[k]), 4))], ["entropy, nats", r.h && ((k) => number(r.h[k], 4))]].filter((one) => one[1]);
      const made = make("table", "sortable"), head = made.createTHead().insertRow(), body = made.createTBody();
      made.append(make("caption", "", `Tokens of response ${r.i}`));
      for (const [name] of names) { const th = make("th"), button = make("button", "sort", name); th.scope = "col"; button.type = "button"; th.append(button); head.append(th); }
      for (let k = 0; k < (r.t || r.c).length; k++) { const row = body.insertRow(); for (const [name, of] of names) { const cell = row.insertCell(); cell.className = name === "text" ? "" : "number"; cell.textContent = of(k); } }
      sortable(made);
      return made;
    }
    function card(r) {
      const box = make("article", "response"), head = make("h3", "", `Response ${r.i}`);
      box.setAttribute("aria-label", `Response ${r.i}`);
      const facts = [];
      if (r.contribution !== null) facts.push(`${signed(r.contribution)} nats per token`);
      if (r.reward !== null && r.reward !== undefined) facts.push(`reward ${number(r.reward)}`);
      if (r.advantage !== null) facts.push(`advantage ${number(r.advantage)}`);
      facts.push(`${r.n} tokens${r.truncated ? ", cut off" : ""}`);
      if (r.entropy !== null) facts.push(`entropy ${number(r.entropy)} nats per token`);
      for (const fact of facts) head.append(make("span", "", fact));
      box.append(head);
      if (promptOf(r)) { const prompt = make("p", "prompt", promptOf(r)); prompt.tabIndex = 0; prompt.setAttribute("role", "group"); prompt.setAttribute("aria-label", `Prompt of response ${r.i}`); box.append(prompt); }
      box.append(tokens(r));
      if (r.c) {
        const button = make("button", "", "Values as a table");
        button.type = "button";
        button.setAttribute("aria-expanded", "false");
        let cells = null;
        button.addEventListener("click", () => {
          if (cells) { cells.remove(); cells = null; } else {
            cells = make("div", "cells scroll"); cells.tabIndex = 0; cells.setAttribute("role", "group"); cells.setAttribute("aria-label", `Values of response ${r.i}`);
            cells.append(table(r)); button.after(cells);
          }
          button.setAttribute("aria-expanded", String(cells !== null));
        });
        box.append(button);
      }
      return box;
    }
    function show() {
      const part = document.createDocumentFragment();
      for (const r of chosen.slice(shown, shown + PAGE)) part.append(card(r));
      shown = Math.min(shown + PAGE, chosen.length);
      list.append(part);
      more.hidden = shown >= chosen.length;
      found.textContent = chosen.length ? `${shown} of ${chosen.length} shown` : `none of ${U.responses.length} responses is like this`;
    }
    function choose() {
      const text = find.value.toLowerCase();
      chosen = U.responses.filter((r) => sides[side.value](r) && (!text || textOf(r).includes(text) || promptOf(r).toLowerCase().includes(text)));
      chosen.sort((a, b) => keys[order.value](a) - keys[order.value](b) || a.i - b.i);
      list.replaceChildren();
      shown = 0;
      show();
    }
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const one of [find, order, side]) one.addEventListener("input", choose);
    more.addEventListener("click", show);
    choose();
  }

  // ---- curves over steps: pointer and arrow keys read values
  for (const area of document.querySelectorAll(".area")) {
    const readings = data(area.dataset.curves), cursor = area.querySelector(".cursor");
    const readout = area.closest("figure").querySelector(".readout");
    let at = readings.length - 1;
    const show = (k) => {
      if (!readings.length) return;
      at = Math.max(0, Math.min(readings.length - 1, k));
      const [place, step, words] = readings[at];
      cursor.hidden = false;
      cursor.style.left = `${place}%`;
      readout.textContent = words;
      area.setAttribute("aria-valuenow", step);
      area.setAttribute("aria-valuetext", words);
    };
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect(), place = 100 * (event.clientX - box.left) / box.width;
      let best = 0;
      readings.forEach(([x], k) => { if (Math.abs(x - place) < Math.abs(readings[best][0] - place)) best = k; });
      show(best);
    });
    area.addEventListener("focus", () => show(at));
    area.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: readings.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }

  // ---- a filter for the table of probes
  const which = $("which");
  if (which) which.addEventListener("input", () => {
    let count = 0;
    for (const row of $("probes").tBodies[0].rows) { row.hidden = which.value !== "all" && row.dataset.verdict !== which.value && !(which.value === "alarm" && row.dataset.alarm); count += !row.hidden; }
    $("which-count").textContent = `${count} shown`;
  });
})();
