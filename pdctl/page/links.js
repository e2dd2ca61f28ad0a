// The link matrix, prefill x decode, as a heat map: only what is in sight is drawn, so that 1,500 x 1,500 costs as much
// as 60 x 60. Every state has a sign besides its colour, and a table says the same to those who see no map.

const CELLS = [26, 22, 18, 14, 11, 8, 6, 4, 3];
const LABELLED = 11; // px of a cell from which on each row and column has its name beside it
const GUTTER = { left: 150, top: 92, bare: 18, lean: 56 }; // px; names of columns lean out over the last one
const RANKS_THAT_FIT = 120;
const GRID_CELLS = 4000; // of the table: by instance it says the same
const SIGNS = { trial: "~", blocked: "×", dropped: "−" };

class LinkMap {
  constructor({ box, size, canvas, tip, cell, announce }) {
    Object.assign(this, { box, size, canvas, tip, cell, announce });
    this.pen = canvas.getContext("2d");
    this.view = { rows: [], columns: [] };
    this.at = null; // the cell that the keyboard is at
    this.readColours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { this.readColours(); this.draw(); });
    box.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.show(this.view)).observe(box);
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.moveTo(this.at || [0, 0]));
    canvas.addEventListener("blur", () => { this.marked = false; this.draw(); });
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = {
      none: colour("heat-none"), trusted: colour("heat-ok"), trial: colour("warn-soft"), blocked: colour("heat-bad"),
      dropped: colour("gone-soft"), inks: { trial: colour("heat-trial-ink"), blocked: colour("heat-bad-ink"), dropped: colour("heat-ink") },
      quiet: colour("quiet"),
      line: colour("line"), card: colour("card"), focus: colour("focus"),
    };
  }

  /** `view`: rows and columns, and whether they are ranks or instances. */
  show(view) {
    this.view = view;
    const { rows, columns } = view;
    const room = this.box.clientWidth;
    const fits = (cell) => columns.length * cell + (cell >= LABELLED ? GUTTER.left + GUTTER.lean : GUTTER.bare) <= room;
    this.step = CELLS.find(fits) || CELLS.at(-1);
    this.left = this.step >= LABELLED ? GUTTER.left : GUTTER.bare;
    this.top = this.step >= LABELLED ? GUTTER.top : GUTTER.bare;
    const lean = this.step >= LABELLED ? GUTTER.lean : 0;
    this.size.style.width = `${Math.max(1, this.left + columns.length * this.step + lean)}px`;
    this.size.style.height = `${Math.max(1, this.top + rows.length * this.step + 4)}px`;
    if (this.at && (this.at[0] >= rows.length || this.at[1] >= columns.length)) this.at = null;
    setAttribute(this.canvas, "aria-label", this.label());
    this.draw();
  }

  label() {
    const { rows, columns } = this.view;
    const out = sum(rows.map((row) => row.out.length));
    return `${rows.length} rows of prefills, ${columns.length} columns of decodes, ${out} cells not trusted. Arrow keys move, Page Down goes to the next that is not trusted`;
  }

  draw() {
    const width = Math.max(1, Math.min(this.box.clientWidth, parseInt(this.size.style.width, 10) || 1));
    const height = Math.max(1, Math.min(this.box.clientHeight || 480, parseInt(this.size.style.height, 10) || 1));
    const ratio = devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
    }
    this.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.pen.fillStyle = this.colours.card;
    this.pen.fillRect(0, 0, width, height);
    this.drawCells(this.range(width, height));
    this.drawNames(this.range(width, height), width, height);
  }

  range(width, height) {
    const { scrollLeft, scrollTop } = this.box;
    const first = [Math.floor(scrollTop / this.step), Math.floor(scrollLeft / this.step)];
    return {
      first,
      end: [
        Math.min(this.view.rows.length, first[0] + Math.ceil((height - this.top) / this.step) + 1),
        Math.min(this.view.columns.length, first[1] + Math.ceil((width - this.left) / this.step) + 1),
      ],
    };
  }

  /** Where a cell's corner is drawn now. */
  corner(row, column) {
    return [this.left + column * this.step - this.box.scrollLeft, this.top + row * this.step - this.box.scrollTop];
  }

  drawCells({ first, end }) {
    const gap = this.step >= 6 ? 1 : 0;
    for (let i = first[0]; i < end[0]; i++) {
      for (let j = first[1]; j < end[1]; j++) {
        const link = this.view.rows[i].links.get(this.view.columns[j].session);
        const [x, y] = this.corner(i, j);
        this.pen.fillStyle = this.colours[link ? link.state : "none"];
        this.pen.fillRect(x, y, this.step - gap, this.step - gap);
        if (link && SIGNS[link.state] && this.step >= LABELLED) this.sign(link, x, y);
      }
    }
    if (this.marked && this.at) this.mark();
  }

  sign(link, x, y) {
    this.pen.fillStyle = this.colours.inks[link.state];
    this.pen.font = `bold ${Math.round(this.step * 0.75)}px sans-serif`;
    this.pen.textAlign = "center";
    this.pen.textBaseline = "middle";
    this.pen.fillText(SIGNS[link.state], x + (this.step - 1) / 2, y + this.step / 2);
  }

  mark() {
    const [x, y] = this.corner(...this.at);
    this.pen.strokeStyle = this.colours.focus;
    this.pen.lineWidth = 2;
    this.pen.strokeRect(x - 1, y - 1, this.step + 1, this.step + 1);
  }

  /** The edges are painted last, over the cells that scroll below them. */
  drawNames({ first, end }, width, height) {
    this.pen.fillStyle = this.colours.card;
    this.pen.fillRect(0, 0, width, this.top - 1);
    this.pen.fillRect(0, 0, this.left - 1, height);
    if (this.step < LABELLED) return this.drawEdges({ first, end });
    this.pen.fillStyle = this.colours.quiet;
    this.pen.font = `${Math.min(12, this.step)}px system-ui, "DejaVu Sans", sans-serif`;
    this.pen.textBaseline = "middle";
    this.pen.textAlign = "right";
    for (let i = first[0]; i < end[0]; i++) {
      const y = this.corner(i, 0)[1] + this.step / 2;
      if (y > this.top) this.pen.fillText(this.fit(this.view.rows[i].name, this.left - 12), this.left - 6, y);
    }
    this.pen.textAlign = "left";
    for (let j = first[1]; j < end[1]; j++) {
      const x = this.corner(0, j)[0] + this.step / 2;
      if (x < this.left) continue;
      this.pen.save();
      this.pen.translate(x, this.top - 6);
      this.pen.rotate(-Math.PI / 3);
      this.pen.fillText(this.fit(this.view.columns[j].name, this.top + 6), 0, 0);
      this.pen.restore();
    }
    return undefined;
  }

  /** Too small for names: a line wherever another instance begins. */
  drawEdges({ first, end }) {
    this.pen.fillStyle = this.colours.quiet;
    const edge = (items, n) => n === 0 || items[n].instance !== items[n - 1].instance;
    for (let i = first[0]; i < end[0]; i++)
      if (edge(this.view.rows, i) && this.corner(i, 0)[1] >= this.top) this.pen.fillRect(6, this.corner(i, 0)[1], 8, 1);
    for (let j = first[1]; j < end[1]; j++)
      if (edge(this.view.columns, j) && this.corner(0, j)[0] >= this.left) this.pen.fillRect(this.corner(0, j)[0], 6, 1, 8);
  }

  fit(text, room) {
    if (this.pen.measureText(text).width <= room) return text;
    let short = text;
    while (short.length > 2 && this.pen.measureText(`…${short}`).width > room) short = short.slice(1);
    return `…${short}`; // its end tells ranks apart
  }

  // --- what a cell says

  point(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const cell = this.cellAt(event.clientX - bounds.left, event.clientY - bounds.top);
    if (!cell) {
      this.tip.hidden = true;
      return;
    }
    const words = this.words(...cell);
    setText(this.tip, words);
    setText(this.cell, words);
    this.tip.hidden = false;
    this.tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - this.tip.offsetWidth - 8))}px`;
    this.tip.style.top = `${Math.min(event.clientY + 16, innerHeight - this.tip.offsetHeight - 8)}px`;
  }

  cellAt(x, y) {
    const column = Math.floor((x - this.left + this.box.scrollLeft) / this.step);
    const row = Math.floor((y - this.top + this.box.scrollTop) / this.step);
    const inside = x >= this.left && y >= this.top && row >= 0 && row < this.view.rows.length && column >= 0 && column < this.view.columns.length;
    return inside ? [row, column] : null;
  }

  words(i, j) {
    const row = this.view.rows[i], column = this.view.columns[j];
    return wordsOf(row, column, row.links.get(column.session));
  }

  key(event) {
    const { rows, columns } = this.view;
    if (!rows.length || !columns.length) return;
    const [i, j] = this.at || [0, 0];
    const to = {
      ArrowUp: [i - 1, j], ArrowDown: [i + 1, j], ArrowLeft: [i, j - 1], ArrowRight: [i, j + 1],
      Home: [i, 0], End: [i, columns.length - 1], PageDown: this.nextOut(1), PageUp: this.nextOut(-1),
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.moveTo([Math.max(0, Math.min(to[0], rows.length - 1)), Math.max(0, Math.min(to[1], columns.length - 1))]);
  }

  /** The next cell that is not trusted, in reading order, round the end. */
  nextOut(way) {
    const { rows, columns } = this.view;
    const [i, j] = this.at || [0, 0];
    const here = i * columns.length + j;
    const places = rows.flatMap((row, n) =>
      columns.flatMap((column, m) => (row.links.has(column.session) && isOut(row.links.get(column.session)) ? [n * columns.length + m] : [])),
    );
    if (!places.length) return [i, j];
    const next = way > 0 ? places.find((place) => place > here) ?? places[0] : places.findLast((place) => place < here) ?? places.at(-1);
    return [Math.floor(next / columns.length), next % columns.length];
  }

  moveTo(cell) {
    if (!this.view.rows.length || !this.view.columns.length) return;
    this.at = cell;
    this.marked = true;
    this.bringIntoSight();
    this.draw();
    const words = this.words(...cell);
    setText(this.cell, words);
    this.announce(words);
  }

  bringIntoSight() {
    const [x, y] = this.corner(...this.at);
    const { box, step } = this;
    if (x < this.left) box.scrollLeft -= this.left - x;
    if (y < this.top) box.scrollTop -= this.top - y;
    if (x + step > box.clientWidth) box.scrollLeft += x + step - box.clientWidth;
    if (y + step > box.clientHeight) box.scrollTop += y + step - box.clientHeight;
  }
}

function wordsOf(row, column, link) {
  const pair = `${row.name} → ${column.name}`;
  if (!link) return `${pair}: no word, nothing has been sent there yet`;
  if (link.counts) return `${pair}: ${countsOf(link)}${link.out.map(({ row: from, link: to }) => `\n${from.seat || from.name}: ${to.sentence || plain(to.cause)}`).join("")}`;
  return link.state === "trusted" ? `${pair}: trusted` : `${pair}: ${link.state === "trial" ? "on trial" : link.state}: ${link.sentence || plain(link.cause)}`;
}

function countsOf(cell) {
  const told = WORSE.toReversed().filter((state) => cell.counts[state]).map((state) => `${cell.counts[state]} ${state === "trial" ? "on trial" : state}`);
  return `${told.join(", ")} of ${sum(Object.values(cell.counts))} links`;
}

/** The map as a table: a row a prefill, a column a decode, each cell a word. */
function fillGrid(table, { rows, columns }) {
  const head = table.tHead;
  fillRows(head, [columns], () => "head", () => make("tr", null, make("th", { scope: "col" }, "Prefill")), (line, all) => {
    fillRows(line, all, (each) => each.session, () => make("th", { scope: "col" }), (cell, each) => setText(cell, each.name), line.firstChild);
  });
  const key = (row) => row.name;
  fillRows(table.tBodies[0], rows, key, (row) => make("tr", null, make("th", { scope: "row" }, row.name)), (line, row) => {
    const cells = columns.map((column) => ({ key: column.session, link: row.links.get(column.session) }));
    fillRows(line, cells, (each) => each.key, () => make("td"), (cell, { link }) => {
      setText(cell, link ? (link.counts ? countsOf(link) : `${SIGNS[link.state] || ""} ${link.state}`.trim()) : "–");
      setAttribute(cell, "class", link ? { trusted: "w-ok", trial: "w-warn", blocked: "w-bad", dropped: "w-gone" }[link.state] : "quiet");
    }, line.firstChild);
  });
}
