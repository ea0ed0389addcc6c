"use strict";
// Sorting, a filter, details on hover and focus, the theme, copying the command. The page reads without it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("tip");

function showTip(x, y, fill) {
  tip.replaceChildren();
  fill(tip);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
  const top = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
const hideTip = () => { tip.hidden = true; };

// The details of a layer are what its table row says, and its histogram.
function describeLayer(table, index) {
  const row = table.querySelector(`tr[data-i="${index}"]`);
  const heads = all("thead button", table);
  return (box) => {
    const list = document.createElement("dl");
    all("td", row).forEach((cell, column) => {
      const text = cell.textContent.trim();
      if (column === 1) {
        const name = document.createElement("b");
        name.textContent = `${Number(index) + 1} ${text}`;
        box.append(name);
      } else if (column > 1 && text) {
        const unit = heads[column].querySelector("small");
        const label = document.createElement("dt");
        label.textContent = heads[column].firstChild.textContent + (unit ? `, ${unit.textContent}` : "");
        const value = document.createElement("dd");
        value.textContent = text;
        list.append(label, value);
      }
    });
    box.append(list);
    const picture = document.querySelector(`#${table.id.replace("-table", "-w")}${index} svg`);
    if (picture) box.append(picture.cloneNode(true));
  };
}

function mark(table, index) {
  all("tr.on", table).forEach((row) => row.classList.remove("on"));
  if (index !== null) table.querySelector(`tr[data-i="${index}"]`).classList.add("on");
}

function setUpStrip(box) {
  const table = document.getElementById(box.dataset.table);
  const strip = box.querySelector("svg");
  const columns = all(".hit", box);
  let active = null;
  const choose = (index, x, y) => {
    columns.forEach((column) => column.classList.toggle("on", column.dataset.i === String(index)));
    mark(table, index);
    active = index;
    if (index === null) hideTip();
    else showTip(x, y, describeLayer(table, index));
  };
  box.addEventListener("pointermove", (event) => {
    const column = event.target.closest(".hit");
    if (column) choose(column.dataset.i, event.clientX, event.clientY);
  });
  box.addEventListener("pointerleave", () => choose(null));
  box.addEventListener("click", (event) => {
    const column = event.target.closest(".hit");
    if (column && event.pointerType !== "touch") {
      table.querySelector(`tr[data-i="${column.dataset.i}"]`).scrollIntoView({ block: "center" });
    }
  });
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") choose(null);
    if (!step) return;
    event.preventDefault();
    const next = Math.min(Math.max(active === null ? 0 : Number(active) + step, 0), columns.length - 1);
    columns[next].scrollIntoView({ block: "nearest", inline: "nearest" });
    const place = columns[next].getBoundingClientRect();
    choose(next, place.right, place.top);
  });
  strip.addEventListener("blur", () => choose(null));
}

function setUpTable(table) {
  const body = table.tBodies[0];
  const heads = all("thead th", table);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    // Numbers start with the largest, names with the first letter.
    const first = head.classList.contains("n") && column > 0 ? "descending" : "ascending";
    const order = before === "none" ? first : before === "ascending" ? "descending" : "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
    const value = (row) => row.cells[column].dataset.v;
    const sign = order === "ascending" ? 1 : -1;
    const numbers = [...body.rows].every((row) => value(row) === "" || !isNaN(value(row)));
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
    });
    body.append(...rows);
  }));
  body.addEventListener("pointermove", (event) => {
    const row = event.target.closest("tr");
    if (row && event.pointerType !== "touch") {
      showTip(event.clientX, event.clientY, describeLayer(table, row.dataset.i));
    }
  });
  body.addEventListener("pointerleave", hideTip);
}

function setUpFilter(input) {
  const table = document.getElementById(input.dataset.filter);
  const count = input.closest(".tools").querySelector(".count");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...table.tBodies[0].rows];
    rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
    count.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers` : "";
  });
}

function setUpTheme(button) {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  prefersDark.addEventListener("change", label);
  label();
}

all(".strip-plot").forEach(setUpStrip);
all("table.layers").forEach(setUpTable);
all("input[data-filter]").forEach(setUpFilter);
setUpTheme(document.getElementById("theme"));
all("[data-tip]").forEach((spot) => {
  const show = (x, y) => showTip(x, y, (box) => { box.textContent = spot.dataset.tip; });
  spot.addEventListener("pointermove", (event) => show(event.clientX, event.clientY));
  spot.addEventListener("pointerleave", hideTip);
});
all(".copy").forEach((button) => {
  if (!navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  });
});
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
addEventListener("wheel", hideTip, { passive: true });
addEventListener("touchmove", hideTip, { passive: true });
