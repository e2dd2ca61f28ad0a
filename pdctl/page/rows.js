// Elements from values, text only: nothing that a rank says of itself is ever read as markup. Rows keep their identity
// when the list around them changes, so that focus, selection and a reader's place survive.

const byId = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setAttribute(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const filled = new WeakMap(); // parent -> key -> row

/** The children of `parent` are `items`: made once for a key, filled every time, moved only when out of place. */
function fillRows(parent, items, keyOf, create, fill, from = null) {
  const held = filled.get(parent) || new Map();
  const rows = new Map();
  const focused = document.activeElement;
  const wanted = new Set(items.map(keyOf));
  for (const [key, row] of held) if (!wanted.has(key)) row.remove();
  let place = from ? from.nextSibling : parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    if (rows.has(key)) continue;
    const row = held.get(key) || create(item);
    rows.set(key, row);
    fill(row, item);
    if (row === place) place = place.nextSibling;
    else parent.insertBefore(row, place);
  }
  filled.set(parent, rows);
  if (focused && focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
}

/** A table that holds only the rows in sight, once there are many: 3,000 rows of ten elements took 400 ms to lay out. */
class LongTable {
  constructor(table, box, keyOf, create, fill, { rowHeight = 33, all = 60 } = {}) {
    Object.assign(this, { table, box, keyOf, create, fill, rowHeight, all, items: [] });
    this.body = table.tBodies[0];
    this.columns = table.tHead.rows[0].cells.length;
    this.above = this.spacer();
    this.below = this.spacer();
    this.body.append(this.above, this.below);
    box.addEventListener("scroll", () => this.draw(), { passive: true });
  }

  spacer() {
    const row = make("tr", { class: "space", "aria-hidden": "true" }, make("td", { colspan: String(this.columns) }));
    row.hidden = true;
    return row;
  }

  show(items) {
    this.items = items;
    setAttribute(this.table, "aria-rowcount", String(items.length + 1));
    setAttribute(this.table, "class", items.length > this.all ? "long" : "");
    this.draw();
  }

  draw() {
    const [first, end] = this.inSight();
    const shown = this.items.slice(first, end);
    this.pad(this.above, first);
    this.pad(this.below, this.items.length - end);
    const offset = new Map(shown.map((item, index) => [this.keyOf(item), first + index + 2]));
    fillRows(this.body, shown, this.keyOf, this.create, (row, item) => {
      setAttribute(row, "aria-rowindex", String(offset.get(this.keyOf(item))));
      this.fill(row, item);
    }, this.above);
  }

  inSight() {
    if (this.items.length <= this.all) return [0, this.items.length];
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.rowHeight) - 8);
    return [first, Math.min(this.items.length, first + Math.ceil(this.box.clientHeight / this.rowHeight) + 16)];
  }

  pad(spacer, n) {
    spacer.hidden = n <= 0;
    spacer.firstChild.style.height = `${Math.max(0, n) * this.rowHeight}px`;
  }
}

/** A row of plain cells; `set(row, texts)` writes them. */
function plainRow(classes) {
  return () => make("tr", null, ...classes.map((name) => make("td", { class: name || null })));
}

function setCells(row, texts) {
  texts.forEach((text, index) => setText(row.cells[index], text));
  const words = row.querySelector(".words");
  if (words) setAttribute(words, "title", words.textContent); // where there are many rows, each has one line
}

const graded = (cell, grade) => setAttribute(cell, "class", `w-${grade}`);
