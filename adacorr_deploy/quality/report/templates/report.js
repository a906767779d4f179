"use strict";
// Everything on the page can be read without this script: it hides what is not chosen, and answers pointers and keys.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);

// --- Which quality the first chart shows --------------------------------------------------------------------------
const choices = one("[data-switch]");
function showMeasure(key) {
  for (const figure of all("[data-measure]")) figure.hidden = figure.dataset.measure !== key;
}
if (choices) {
  choices.hidden = false;
  choices.addEventListener("change", (event) => showMeasure(event.target.value));
  showMeasure(one("input:checked", choices).value);
}

// --- Reading a point ----------------------------------------------------------------------------------------------
const said = one('[data-readout="pareto"]');
for (const point of all(".point")) {
  for (const kind of ["pointerenter", "focus"]) {
    point.addEventListener(kind, () => { said.textContent = point.dataset.text; });
  }
}

// --- One policy at a time -----------------------------------------------------------------------------------------
const picker = one("[data-picker]");
const select = one("select", picker);
const articles = all("article.policy");
function choose(anchor) {
  const article = articles.find((each) => each.id === anchor);
  if (!article) return null;
  select.value = anchor;
  for (const each of articles) each.hidden = each !== article;
  for (const mark of all("[data-for]")) mark.classList.toggle("chosen", mark.dataset.for === article.dataset.policy);
  for (const chart of all(".growth")) chart.classList.toggle("has-chosen", one(".chosen", chart) !== null);
  return article;
}
picker.hidden = false;
select.addEventListener("change", () => choose(select.value));
for (const button of all("[data-step]", picker)) {
  button.addEventListener("click", () => {
    const at = select.selectedIndex + Number(button.dataset.step);
    choose(select.options[(at + articles.length) % articles.length].value);
  });
}
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#policy-"]');
  if (!link) return;
  event.preventDefault();
  const article = choose(link.getAttribute("href").slice(1));
  history.replaceState(null, "", link.getAttribute("href"));
  one("#h-policies").scrollIntoView();
  article.focus({ preventScroll: true });
});
if (!choose(location.hash.slice(1))) choose(select.value);

// --- Sorting the table --------------------------------------------------------------------------------------------
const order = (cell) => ({ inf: Infinity, "-inf": -Infinity })[cell.dataset.order] ?? Number(cell.dataset.order);
for (const button of all("[data-sort]")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const column = head.cellIndex;
    const descending = head.getAttribute("aria-sort") !== "descending";
    for (const other of all("thead th")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = one("tbody");
    const compare = button.dataset.sort === "text"
      ? (a, b) => b.cells[0].textContent.trim().localeCompare(a.cells[0].textContent.trim())
      : (a, b) => (order(b.cells[column]) > order(a.cells[column])) - (order(b.cells[column]) < order(a.cells[column]));
    const rows = all("tr", body).sort(compare);
    if (!descending) rows.reverse();
    body.append(...rows);
  });
}

// --- The cursor on the maps ---------------------------------------------------------------------------------------
for (const maps of all("[data-map]")) {
  const cells = JSON.parse(one('script[type="application/json"]', maps).textContent);
  const blocks = cells.action.length;
  const steps = cells.action[0].length;
  const readout = one("[data-readout]", maps);
  let step = 0;
  let block = 0;
  const move = (toStep, toBlock) => {
    step = Math.min(Math.max(toStep, 0), steps - 1);
    block = Math.min(Math.max(toBlock, 0), blocks - 1);
    for (const cursor of all(".cursor", maps)) {
      cursor.hidden = false;
      Object.assign(cursor.style, {
        left: `${(100 * step) / steps}%`, top: `${(100 * block) / blocks}%`, width: `${100 / steps}%`, height: `${100 / blocks}%`,
      });
    }
    const score = cells.scores[block][step];
    readout.textContent = `step ${step + 1}, block ${block}: ${cells.actions[cells.action[block][step]]}, ` +
      `${cells.reasons[cells.reason[block][step]]}${score === null ? "" : `, score ${score}`}`;
  };
  for (const map of all(".map", maps)) {
    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect();
      move(Math.floor(((event.clientX - box.left) / box.width) * steps), Math.floor(((event.clientY - box.top) / box.height) * blocks));
    });
    map.addEventListener("focus", () => move(step, block));
    map.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-steps, 0], End: [steps, 0] }[event.key];
      if (!by) return;
      event.preventDefault();
      move(step + by[0], block + by[1]);
    });
  }
}

// --- Flipping between a policy's images and the uncached ones -----------------------------------------------------
for (const blink of all("[data-blink]")) {
  blink.hidden = false;
  const article = blink.closest("article");
  const image = one("[data-own]", article);
  const caption = one("[data-shows]", article);
  const own = image.src;
  const uncached = one(".grids img", article).src;
  const button = one("button", blink);
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    image.src = pressed ? uncached : own;
    caption.textContent = pressed ? "uncached" : article.dataset.policy;
  });
}
