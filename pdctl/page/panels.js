// The panels: each takes what the model has found and writes it into its elements. None of them keeps anything of its own
// but what the reader has chosen: which instance is open, how the matrix is shown, which events.

const PROBLEMS_SHOWN = 8;
const ROOMS_SHOWN = 50;
const CHART_S = [60, 120, 300, 600]; // the shortest that shows all there is
const SEATS_DRAWN = 64, SEATS_NARROW = 24;
const GRADES = { bad: "Broken", warn: "Look at", info: "Note" };

// --- what is wrong

class Verdict {
  constructor() {
    this.all = false;
    byId("problem-more").addEventListener("click", () => { this.all = !this.all; this.write(); });
  }

  show(problems, picture) {
    this.problems = problems;
    this.words = verdictOf(problems, picture);
    this.write();
  }

  write() {
    const { problems } = this;
    setText(byId("verdict"), this.words);
    setAttribute(byId("problems"), "data-worst", (problems.find((each) => each.grade !== "info") || { grade: "ok" }).grade);
    const shown = this.all ? problems.slice(0, 200) : problems.slice(0, PROBLEMS_SHOWN);
    fillRows(byId("problem-list"), shown, (each) => `${each.grade} ${each.on} ${each.what.replace(/[\d.]+/g, "#")}`, newProblem, fillProblem);
    const rest = problems.length - PROBLEMS_SHOWN;
    byId("problem-more").hidden = rest <= 0;
    setText(byId("problem-more"), this.all ? "Show fewer" : `Show ${rest} more`);
  }
}

function verdictOf(problems, picture) {
  const bad = problems.filter((each) => each.grade === "bad").length;
  const warn = problems.filter((each) => each.grade === "warn").length;
  if (bad) return bad === 1 ? "One thing is broken" : `${bad} things are broken`;
  if (warn) return warn === 1 ? "It serves; one thing to look at" : `It serves; ${warn} things to look at`;
  if (!picture.instances.size) return "No instance has registered yet";
  return "Everything serves";
}

const newProblem = () => make("li", null, make("span", { class: "grade" }), make("span", { class: "what" }), make("span", { class: "do" }));

function fillProblem(row, problem) {
  setAttribute(row, "class", problem.grade);
  setText(row.children[0], GRADES[problem.grade]);
  setText(row.children[1], problem.what);
  setText(row.children[2], `→ ${problem.todo}`);
}

// --- figures

function showTiles({ picture, links, rooms, now }) {
  const instances = [...picture.instances.values()];
  const ready = instances.filter((each) => each.ready && !each.dead).length;
  const seats = sum(instances.map((each) => each.seats)), held = sum(instances.map((each) => each.alive));
  tile("instances", `${ready} of ${instances.length}`, roles(instances), ready < instances.length ? "bad" : "");
  tile("seats", `${held} of ${seats}`, held < seats ? `${seats - held} missing` : "each by a rank of its own", held < seats ? "bad" : "");
  showLinksTile(links);
  showRoomTiles(rooms, now);
  showMoving(picture.meter, now);
}

function tile(name, figure, below, grade = "") {
  const element = byId(`tile-${name}`);
  setText(element, figure);
  setText(byId(`tile-${name}-sub`), below);
  setAttribute(element.parentElement, "class", `tile ${grade}`.trim());
}

function roles(instances) {
  const counted = new Map();
  for (const each of instances) counted.set(each.role, (counted.get(each.role) || 0) + 1);
  return [...counted].sort().map(([role, n]) => `${n} ${role}`).join(", ");
}

function showLinksTile({ rows, stray }) {
  const all = rows.flatMap((row) => row.out), out = all.filter((link) => !stray.has(link.session)), used = sum(rows.map((row) => row.links.size));
  const count = (state) => out.filter((link) => link.state === state).length;
  const gone = count("blocked") + count("dropped"), trial = count("trial");
  const past = all.length - out.length;
  const below = [`of ${used} in use`, trial ? `${trial} on trial` : "", past ? `${past} to ranks that are gone` : ""].filter(Boolean).join(", ");
  tile("links", String(gone), rows.length ? below : "no rank reports any", gone ? "bad" : trial ? "warn" : "");
}

function showRoomTiles(rooms, now) {
  const { sender, receiver } = rooms.sides;
  tile("rooms", String(inFlight(sender)), `${sender.transferring} transferring; decode has ${inFlight(receiver)} open`);
  const lately = failedLately(rooms, now);
  tile("failed", String(lately.length), lately.length ? plain(lately[0].cause) : "none", lately.length ? "warn" : "");
}

function showMoving(meter, now) {
  const n = 10;
  const sent = sum(meter.last_s("sent", n, now)) / n, arrived = sum(meter.last_s("arrived", n, now)) / n;
  tile("moving", `${inBytes(Math.max(sent, arrived))}/s`, `${inBytes(sent)}/s sent, ${inBytes(arrived)}/s arrived`);
}

// --- the fleet

class Fleet {
  constructor() {
    this.open = new URLSearchParams(location.hash.slice(1)).get("instance");
    this.table = new LongTable(byId("fleet"), byId("fleet-box"), (each) => each.name, () => this.newRow(), fillInstance);
    this.ranks = new LongTable(byId("ranks"), byId("detail-box"), (each) => `${each.key} ${each.row.epoch}`, newRank, fillRank);
    byId("fleet").addEventListener("keydown", (event) => this.step(event));
  }

  newRow() {
    const button = make("button", { type: "button", "aria-controls": "detail", onclick: (event) => this.toggle(event.target.dataset.name) });
    return make("tr", null, make("th", { scope: "row" }, button), make("td"), make("td"), make("td", null, make("span", { role: "img" })), make("td", { class: "n" }), make("td", { class: "wide" }));
  }

  toggle(name) {
    this.open = this.open === name ? null : name;
    history.replaceState(null, "", this.open ? `#instance=${encodeURIComponent(name)}` : location.pathname + location.search);
    this.show(this.last);
    if (this.open) byId("h-detail").scrollIntoView({ block: "nearest" });
  }

  /** Up and down from one instance to the next. */
  step(event) {
    const way = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const row = way && event.target.closest("tr");
    const next = row && row[way] && row[way].querySelector("button");
    if (!next) return;
    event.preventDefault();
    next.focus();
  }

  show(seen) {
    this.last = seen;
    const { picture, filter } = seen;
    const all = [...picture.instances.values()];
    const found = all.filter((each) => matchesInstance(each, picture, filter));
    const listed = found.map((each) => ({ ...each, state: stateOf(each), isOpen: each.name === this.open }));
    listed.sort((a, b) => a.state.rank - b.state.rank || inOrder(a.role, b.role) || inOrder(a.name, b.name));
    this.table.show(listed);
    setText(byId("fleet-count"), listed.length > 8 ? `${listed.length} instances, those in trouble first` : "");
    byId("fleet-empty").hidden = found.length > 0;
    setText(byId("fleet-empty"), all.length ? "No instance fits the filter." : "No rank has registered here. Start one, or point an engine's bootstrap address at this registry: pdctl explain says what to look at.");
    this.showDetail(picture);
  }

  showDetail(picture) {
    const instance = this.open === null ? null : picture.instances.get(this.open);
    byId("detail").hidden = !instance;
    if (!instance) return;
    setText(byId("h-detail"), `${instance.name}: ${instance.alive} of ${instance.seats} seats held`);
    setText(byId("detail-why"), detailWords(instance));
    this.ranks.show(ranksOf(instance, picture));
  }
}

function detailWords(instance) {
  const missing = (instance.missing_seats || []).map((row) => shortSeat(row.seat));
  const told = [instance.role, layoutOf(instance)];
  if (missing.length) told.push(`missing: ${some(missing, 24)}`);
  if (instance.health) told.push(instance.health);
  if (instance.forming) told.push(`another incarnation forms beside it: ${instance.forming.alive_seats.length} ranks so far`);
  return told.filter(Boolean).join(" · ");
}

function matchesInstance(instance, picture, filter) {
  if (!filter) return true;
  const words = [instance.name, instance.role, ...ranksOf(instance, picture).flatMap(({ key, row }) => [key, row.address, (row.metadata || {}).mooncake_session])];
  return words.some((word) => word && String(word).toLowerCase().includes(filter));
}

function fillInstance(row, instance) {
  const button = row.cells[0].firstChild;
  setText(button, instance.name);
  button.dataset.name = instance.name;
  setAttribute(button, "aria-expanded", String(instance.isOpen));
  setText(row.cells[1], instance.role);
  setText(row.cells[2], instance.state.word);
  graded(row.cells[2], instance.state.grade);
  fillStrip(row.cells[3].firstChild, instance);
  setText(row.cells[4], `${instance.alive}/${instance.seats}`);
  setText(row.cells[5], layoutOf(instance));
}

/** A mark a seat; of many, a bar whose parts are as wide as they are many. */
function fillStrip(strip, instance) {
  const { seats, cut } = seatsOf(instance);
  const told = seats.map((each) => each.standing).concat(cut ? [`missing ${cut}`] : []).join();
  if (strip.told === told) return;
  strip.told = told;
  const shared = seats.length + cut > SEATS_DRAWN;
  setAttribute(strip, "class", `strip${shared ? " share" : seats.length > SEATS_NARROW ? " many" : ""}`);
  strip.replaceChildren(...(shared ? shares(seats, cut) : seats.map((each) => make("i", { class: `seat ${each.standing}`, title: `${each.seat}: ${each.standing}` }))));
  const missing = seats.filter((each) => each.standing === "missing").map((each) => each.seat);
  const other = seats.filter((each) => !["alive", "missing"].includes(each.standing)).map((each) => `${each.seat} ${each.standing}`);
  setAttribute(strip, "aria-label", [`${instance.alive} of ${instance.seats} seats held`, missing.length ? `missing ${some(missing, 8)}` : "", some(other, 8)].filter(Boolean).join("; "));
}

function shares(seats, cut) {
  return ["alive", "suspect", "draining", "missing"].map((standing) => {
    const part = make("i", { class: `seat ${standing}` });
    part.style.flexGrow = String(seats.filter((each) => each.standing === standing).length + (standing === "missing" ? cut : 0));
    return part;
  });
}

const newRank = plainRow(["", "", "", "", "", "n", "words"]);

function fillRank(line, { row, seat, report, instance }) {
  const now = performance.now();
  const age = row.age_s === undefined ? null : row.age_s + (now - instance.heard) / 1000;
  setCells(line, [
    seat,
    row.standing,
    row.address,
    `#${row.epoch % 2 ** 32}${age === null ? "" : `, ${inWords(age)}`}`,
    row.ttl_s === null || row.ttl_s === undefined ? "none: speaks once" : `${inWords(row.ttl_s)}`,
    report ? String(sum(Object.values(report.rooms || {}).flatMap((phases) => Object.values(phases)))) : "",
    saysOf(report, now),
  ]);
  graded(line.cells[1], { alive: "ok", suspect: "warn", draining: "rest" }[row.standing] || "bad");
  setAttribute(line.cells[3], "title", `epoch ${row.epoch}, incarnation ${row.incarnation}`);
}

function saysOf(report, now) {
  if (!report) return "does not report";
  const out = report.out.length;
  const told = [
    ...(report.unready || []),
    out ? `${out} of ${report.links.size} links out` : "",
    report.quarantined ? `${report.quarantined} pages quarantined` : "",
    report.doubt ? "doubts itself" : "",
    report.store && !report.store.attached ? report.store.sentence : "",
  ].filter(Boolean);
  return `${told.join("; ") || "well"} (${inWords((now - report.at) / 1000)} ago)`;
}

// --- links

class Links {
  constructor(announce) {
    this.map = new LinkMap({ box: byId("matrix"), size: byId("matrix-size"), canvas: byId("map"), tip: byId("tip"), cell: byId("cell"), announce });
    this.out = new LongTable(byId("out"), byId("out-box"), (each) => each.key, plainRow(["", "", "", "", "n", "n", "words"]), fillOut);
    for (const name of ["level", "as-table"]) byId(name).addEventListener("change", () => this.show(this.last));
  }

  show(seen) {
    this.last = seen;
    const { filter, now } = seen;
    const links = filtered(seen.links, filter);
    const many = Math.max(links.rows.length, links.columns.length) > RANKS_THAT_FIT;
    const level = byId("level").value === "auto" ? (many ? "instance" : "rank") : byId("level").value;
    const view = level === "instance" ? byInstance(links) : links;
    this.showEmpty(links);
    this.showView(view, Boolean(links.rows.length && links.columns.length));
    const out = linksOut(links).map((each) => ({ ...each, now }));
    this.out.show(out);
    setText(byId("out-count"), out.length > 6 ? String(out.length) : "");
    byId("out-box").hidden = !out.length;
    setText(byId("out-empty"), out.length ? "" : links.rows.length ? "None: every link that is used is trusted." : "");
  }

  showView(view, isThere) {
    const asTable = byId("as-table").checked;
    const fits = view.rows.length * view.columns.length <= GRID_CELLS;
    byId("matrix").hidden = asTable || !isThere;
    byId("matrix-table").hidden = !asTable || !isThere || !fits;
    if (!asTable) this.map.show(view);
    else if (fits) fillGrid(byId("grid"), view);
    if (asTable && isThere) setText(byId("cell"), fits ? "" : `${view.rows.length} × ${view.columns.length} cells are too many for a table: choose "by instance", or filter`);
  }

  showEmpty({ rows, columns }) {
    const there = rows.length && columns.length;
    byId("links-empty").hidden = Boolean(there);
    setText(byId("links-empty"), rows.length || columns.length ? "No link has been used yet." : "No rank has told of its links: ranks of pdctl do, stock engines cannot.");
  }
}

function filtered(links, filter) {
  if (!filter) return links;
  const fits = (each) => `${each.name} ${each.session || ""}`.toLowerCase().includes(filter);
  const rows = links.rows.filter(fits), columns = links.columns.filter(fits);
  return { rows: rows.length || !columns.length ? rows : links.rows, columns: columns.length || !rows.length ? columns : links.columns };
}

function fillOut(line, { row, link, to, now }) {
  const passed = (now - link.at) / 1000;
  setCells(line, [row.name, to || link.session, link.state === "trial" ? "on trial" : link.state, plain(link.cause), inWords((link.since_s || 0) + passed), askedAgain(link, passed), link.sentence || ""]);
  graded(line.cells[2], { trial: "warn", blocked: "bad", dropped: "gone" }[link.state]);
}

function askedAgain(link, passed) {
  if (link.state === "trial") return "";
  if (typeof link.again_in_s === "number") return `in ${inWords(Math.max(0, link.again_in_s - passed))}`;
  return link.state === "dropped" || /registers anew/.test(link.sentence) ? "when it registers" : "now";
}

// --- KV on the wire

const SVG = "http://www.w3.org/2000/svg";

class Chart {
  constructor(svg, words) {
    Object.assign(this, { svg, words });
    const draw = (tag, attributes) => {
      const element = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      svg.append(element);
      return element;
    };
    this.lines = [0, 1].map(() => draw("line", {}));
    this.most = draw("text", { x: 4, y: 12 });
    this.from = draw("text", { x: 4, "text-anchor": "start" });
    this.to = draw("text", { "text-anchor": "end" });
    this.paths = { sent: draw("path", { class: "sent" }), arrived: draw("path", { class: "arrived" }) };
    words.append(make("span", { class: "swatch sent" }), make("span"), make("span", { class: "swatch arrived" }), make("span"));
  }

  show(meter, now) {
    const width = this.svg.clientWidth || 600, height = 150, floor = 132, top = 18;
    const watched = watched_s(meter, now), seconds = CHART_S.find((each) => each >= watched) || CHART_S.at(-1);
    const series = { sent: meter.last_s("sent", seconds, now), arrived: meter.last_s("arrived", seconds, now) };
    const most = Math.max(1, ...series.sent, ...series.arrived);
    setAttribute(this.svg, "viewBox", `0 0 ${width} ${height}`);
    this.frame(width, floor, top, most, seconds);
    for (const [name, values] of Object.entries(series)) {
      const x = (i) => ((i / (seconds - 1)) * width).toFixed(1);
      const y = (value) => (floor - (value / most) * (floor - top)).toFixed(1);
      setAttribute(this.paths[name], "d", `M${values.map((value, i) => `${x(i)} ${y(value)}`).join("L")}`);
    }
    setText(this.words.children[1], `sent by prefills: ${toldOf(series.sent, watched)}.`);
    setText(this.words.children[3], `arrived at decodes: ${toldOf(series.arrived, watched)}.`);
  }

  frame(width, floor, top, most, seconds) {
    [floor, top].forEach((y, i) => {
      for (const [name, value] of [["x1", 0], ["x2", width], ["y1", y], ["y2", y]]) setAttribute(this.lines[i], name, String(value));
    });
    setText(this.most, most > 1 ? `${inBytes(most)}/s` : "");
    setText(this.from, `${inWords(seconds)} ago`);
    setText(this.to, "now");
    setAttribute(this.from, "y", "147");
    setAttribute(this.to, "y", "147");
    setAttribute(this.to, "x", String(width - 4));
  }
}

function watched_s(meter, now) {
  return meter.since === null ? 0 : Math.max(0, Math.min(CHART_S.at(-1), now / 1000 - meter.lag_s - meter.since));
}

function toldOf(values, seconds) {
  const lately = sum(values.slice(-10)) / 10;
  return `${inBytes(lately)}/s now, ${inBytes(Math.max(0, ...values))}/s at most, ${inBytes(sum(values))} in ${inWords(seconds)} of watching`;
}

// --- rooms

function showRooms({ rooms, filter, now }) {
  const sides = [["sender", "prefill, sending"], ["receiver", "decode, receiving"]].map(([side, name]) => ({ name, counts: rooms.sides[side] }));
  fillRows(byId("phases").tBodies[0], sides, (each) => each.name, newPhases, fillPhases);
  const fits = (room) => !filter || `${room.who} ${room.peer || ""} ${room.room} ${room.cause || ""}`.toLowerCase().includes(filter);
  const open = rooms.open.filter(fits), failed = rooms.failed.filter(fits);
  const key = (room) => `${room.who} ${room.side} ${room.room}`;
  fillRows(byId("open").tBodies[0], open.slice(0, ROOMS_SHOWN), key, plainRow(["", "", "", "n", ""]), (line, room) =>
    setCells(line, [String(room.room), room.who, plain(room.phase), inWords((now - room.at) / 1000), room.peer || ""]));
  fillRows(byId("failed").tBodies[0], failed.slice(0, ROOMS_SHOWN), key, plainRow(["", "", "n", "", "words"]), (line, room) =>
    setCells(line, [String(room.room), room.who, inWords((now - room.at) / 1000), plain(room.cause), room.sentence || ""]));
  setText(byId("open-empty"), open.length ? more(open) : "No room is open.");
  setText(byId("failed-empty"), failed.length ? more(failed) : "No rank remembers a room that failed.");
  byId("open").hidden = !open.length;
  byId("failed").hidden = !failed.length;
}

const more = (list) => (list.length > ROOMS_SHOWN ? `and ${list.length - ROOMS_SHOWN} more` : "");

const newPhases = () => make("tr", null, make("th", { scope: "row" }), ...PHASES.map(() => make("td", { class: "n" })),
  make("td", { class: "bar", "aria-hidden": "true" }, make("div", { class: "phases" }, ...PHASES.map((phase) => make("i", { class: phase })))),
  make("td", { class: "n" }), make("td", { class: "n" }));

function fillPhases(row, { name, counts }) {
  setText(row.cells[0], name);
  PHASES.forEach((phase, i) => setText(row.cells[i + 1], String(counts[phase])));
  const parts = row.cells[4].firstChild.children;
  PHASES.forEach((phase, i) => { parts[i].style.flexGrow = String(counts[phase]); });
  setText(row.cells[5], String(counts.success));
  setText(row.cells[6], String(counts.failed));
}

// --- events

const EVENT_GRADES = {
  seated: "ok", completed: "ok", recovered: "ok", found: "ok", readmitted: "ok", journal_well: "ok", on_trial: "warn",
  suspected: "warn", refused: "warn", denied: "warn", put_off: "rest", room_failed: "warn", report_lost: "warn", doubt: "warn", draining: "rest",
  expired: "bad", lost: "bad", ejected: "bad", panic: "bad", journal_trouble: "bad", dropped: "gone",
};
const SAID_ALOUD = new Set(["ejected", "readmitted", "dropped", "expired", "lost", "completed", "journal_trouble", "journal_well"]);

class Events {
  constructor() {
    byId("kind").addEventListener("change", () => this.show(this.last));
    this.kinds = new Set();
  }

  show(seen) {
    this.last = seen;
    const { picture, filter } = seen;
    this.offerKinds(picture.events);
    const kind = byId("kind").value;
    const fits = (each) => (!kind || each.kind === kind) && (!filter || `${each.instance || ""}/${each.rank || ""} ${each.session || ""} ${each.peer || ""} ${each.sentence}`.toLowerCase().includes(filter));
    const found = together(picture.events.filter(fits)).slice(-200).reverse();
    const names = new Map(seen.links.columns.map((column) => [column.session, column.name]));
    fillRows(byId("events"), found, (each) => each.first, newEvent, (row, each) => fillEvent(row, each, names));
    setText(byId("events-empty"), found.length ? "" : picture.events.length ? "No event fits." : "Nothing has happened since this registry began.");
  }

  offerKinds(events) {
    const kinds = new Set(events.map((each) => each.kind));
    if ([...kinds].every((kind) => this.kinds.has(kind))) return;
    this.kinds = new Set([...this.kinds, ...kinds]);
    const chosen = byId("kind").value;
    byId("kind").replaceChildren(make("option", { value: "" }, "all"), ...[...this.kinds].sort().map((kind) => make("option", { value: kind }, plain(kind))));
    byId("kind").value = chosen;
  }
}

/** Neighbours that differ in numbers alone are one line: of a peer that hangs, a hundred rooms say the same. */
function together(events) {
  const lines = [];
  const alike = (each) => [each.kind, each.instance, each.rank, each.session, each.sentence.replace(/[\d.]+/g, "#")].join("\n");
  for (const each of events) {
    const last = lines.at(-1), what = alike(each);
    if (last && last.alike === what) Object.assign(last, each, { count: last.count + each.count });
    else lines.push({ ...each, alike: what, first: each.id });
  }
  return lines;
}

const newEvent = () => make("li", null, make("time"), make("span", { class: "head" }), make("span", { class: "text" }));

function fillEvent(row, event, names) {
  const [time, head, text] = row.children;
  setText(time, new Date(event.at).toLocaleTimeString("en-GB"));
  setAttribute(time, "datetime", event.at);
  setAttribute(time, "title", event.at);
  const whose = event.instance ? `${event.instance}${event.rank ? `/${event.rank}` : ""}` : event.session || event.peer || "";
  const whom = event.instance && names.get(event.session) ? ` → ${names.get(event.session)}` : "";
  setText(head, `${plain(event.kind)}${whose ? ` · ${whose}` : ""}${whom}${event.count > 1 ? ` · ${event.count} times` : ""}`);
  setAttribute(head, "class", `head w-${EVENT_GRADES[event.kind] || "rest"}`);
  setText(text, event.registry ? `${event.sentence} (at ${event.registry})` : event.sentence);
}
