// The picture of a fleet, from what the registry tells: instances, ranks' reports, sessions, events. And what it means.
//
// Knows no element of the page and opens no connection. Times are milliseconds of performance.now(); what the registry
// tells of time are ages, each turned into a moment on arrival, so that no clock of another host is believed.

const KEPT_EVENTS = 500;
const LATELY_MS = 60_000;
const METER_S = 720; // ten minutes, and what is still coming in
const LAG_S = { least: 6, most: 90 }; // ranks report every 5 s, crowds less often: the last seconds are not whole yet
const WORSE = ["none", "trusted", "trial", "dropped", "blocked"];
const PHASES = ["bootstrapping", "waiting_for_input", "transferring"];

const collator = new Intl.Collator("en", { numeric: true });
const inOrder = (a, b) => collator.compare(a, b);
const worse = (a, b) => (WORSE.indexOf(a) >= WORSE.indexOf(b) ? a : b);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);

/** "dp0/cp0/tp1/pp0", "dp0-cp0-tp1-pp0" and "tp1" are one seat: the last is shown. */
function shortSeat(seat) {
  const parts = String(seat).split(/[-/]/).filter((part) => !/^[a-z]+0$/.test(part));
  return parts.length ? parts.join("-") : "tp0";
}

const rankKey = (instance, seat) => `${instance}/${shortSeat(seat)}`;

/** Bytes by the second, two series; what a report says is spread evenly over the time since the one before. */
class Meter {
  constructor() {
    this.series = { sent: new Map(), arrived: new Map() };
    this.last = new Map();
    this.since = null;
    this.lag_s = LAG_S.least;
  }

  take(key, report, now) {
    const at = (now - report.age_s * 1000) / 1000;
    const before = this.last.get(key);
    if (before && at <= before.at) return;
    this.last.set(key, { at, bytes: report.bytes, epoch: report.epoch });
    this.since ??= at;
    if (!before || before.epoch !== report.epoch || report.bytes < before.bytes || at - before.at > METER_S) return;
    this.lag_s = Math.min(LAG_S.most, Math.max(LAG_S.least, at - before.at + 1, this.lag_s * 0.999));
    const moved = report.bytes - before.bytes;
    if (moved > 0) this.spread(report.role === "prefill" ? "sent" : "arrived", moved, before.at, at);
  }

  spread(name, nbytes, from, to) {
    const bins = this.series[name];
    for (let second = Math.floor(from); second < to; second++) {
      const share = (Math.min(to, second + 1) - Math.max(from, second)) / (to - from);
      bins.set(second, (bins.get(second) || 0) + nbytes * share);
    }
  }

  /** Bytes a second for each of the last `n` whole seconds, oldest first. */
  last_s(name, n, now) {
    const end = Math.floor(now / 1000 - this.lag_s);
    return Array.from({ length: n }, (_, i) => this.series[name].get(end - n + i) || 0);
  }

  trim(now) {
    const oldest = now / 1000 - METER_S;
    for (const bins of Object.values(this.series)) for (const second of bins.keys()) if (second < oldest) bins.delete(second);
  }

  forget(key) { this.last.delete(key); }
}

/** What is known, and how it is kept up: one method for each message of the stream. */
class Picture {
  constructor() {
    this.meter = new Meter();
    this.events = [];
    this.clear();
  }

  clear() {
    this.instances = new Map();
    this.reports = new Map();
    this.sessions = new Map();
    this.service = {};
    this.known = false;
  }

  overview(body, now) {
    this.clear();
    this.known = true;
    this.setService(body.service, now);
    for (const instance of body.instances || []) this.instance(instance, now);
    for (const report of body.reports || []) this.report(report, now);
    for (const session of body.sessions || []) this.session(session, now);
  }

  setService(service, now) { this.service = { ...(service || {}), heard: now }; }

  instance(row, now) {
    if (row.gone) this.instances.delete(row.name);
    else this.instances.set(row.name, { ...row, heard: now });
  }

  report(row, now) {
    const key = rankKey(row.instance, row.seat);
    if (row.gone) {
      this.reports.delete(key);
      this.meter.forget(key);
      return;
    }
    const held = { ...row, key, age_s: row.age_s || 0 };
    held.at = now - held.age_s * 1000;
    held.links = new Map((row.links || []).map((link) => [link.session, Object.assign(link, { at: held.at })]));
    held.out = [...held.links.values()].filter(isOut);
    this.meter.take(key, held, now);
    this.reports.set(key, held);
  }

  session(row, now) {
    if (row.gone) this.sessions.delete(row.session);
    else this.sessions.set(row.session, { ...row, at: now });
  }

  /** An event that is known already (it counts again) takes its own place; the list stays in order. */
  event(row) {
    const last = this.events.at(-1);
    if (!last || row.id > last.id) this.events.push(row);
    else {
      const place = this.events.findIndex((each) => each.id >= row.id);
      this.events.splice(place, this.events[place].id === row.id ? 1 : 0, row);
    }
    if (this.events.length > KEPT_EVENTS) this.events.splice(0, this.events.length - KEPT_EVENTS);
  }

  forgetEvents() { this.events = []; }

  /** Those that the registry has let go of are gone here too. */
  get told() { return [...this.reports.values()]; }
}

/** One rank: the row that the registry has of it, and what it last said. */
function ranksOf(instance, picture) {
  const rows = [...(instance.alive_seats || []), ...((instance.forming || {}).alive_seats || [])];
  return rows.map((row) => {
    const key = rankKey(instance.name, row.seat);
    return { key, row, seat: shortSeat(row.seat), instance, report: picture.reports.get(key) };
  });
}

/** How the seats of an instance stand, in their order; `cut` are missing ones that were not listed. */
function seatsOf(instance) {
  const held = (instance.alive_seats || []).map((row) => ({ row, seat: shortSeat(row.seat), standing: row.standing }));
  const missing = (instance.missing_seats || []).map((row) => ({ row, seat: shortSeat(row.seat), standing: "missing" }));
  const place = ({ row }) => [row.dp, row.pp, row.cp, row.tp].map((n) => String(n || 0).padStart(5, "0")).join();
  const seats = [...held, ...missing].map((each) => ({ ...each, place: place(each) }));
  seats.sort((a, b) => (a.place < b.place ? -1 : 1));
  return { seats, cut: Math.max(0, (instance.missing || 0) - missing.length) };
}

/** An instance's state in a word, its grade, and a number by which the worst come first. */
function stateOf(instance) {
  const suspects = (instance.alive_seats || []).filter((row) => row.standing === "suspect").length;
  if (instance.dead) return { word: "dead", grade: "bad", rank: 0 };
  if (!instance.ready) return { word: `${instance.missing} missing`, grade: "bad", rank: 1 };
  if (suspects) return { word: `${suspects} suspect`, grade: "warn", rank: 2 };
  if (instance.draining) return { word: "draining", grade: "rest", rank: 3 };
  return { word: instance.forming ? "ready, another forms" : "ready", grade: "ok", rank: 4 };
}

function layoutOf(instance) {
  const shape = instance.shape;
  if (!shape) return instance.wire || "";
  const sizes = [["tp", shape.attn_tp_size], ["pp", shape.pp_size], ["dp", shape.dp_size], ["cp", shape.attn_cp_size]];
  const told = sizes.filter(([axis, n]) => n > 1 || axis === "tp").map(([axis, n]) => `${axis}${n}`);
  return [told.join(" "), `page ${shape.page_size}`, shape.kv_cache_dtype].filter(Boolean).join(" · ");
}

/**
 * Prefill x decode, by rank. A row is who judges (a prefill rank by its report, or this service by its own table), a
 * column a session that is judged; a decode that nobody has judged yet is a column as well. `stray` sessions are no
 * registered rank's, though others' are: of a rank that another has replaced, mostly, and no loss.
 */
function linksOf(picture) {
  const columns = new Map();
  const column = (session, key, instance, seat) => {
    if (session && (!columns.has(session) || (key && !columns.get(session).instance)))
      columns.set(session, { session, name: key || session, instance: instance || null, seat: seat || session });
  };
  const rows = [];
  for (const instance of picture.instances.values()) {
    for (const rank of ranksOf(instance, picture)) {
      const session = (rank.row.metadata || {}).mooncake_session || (rank.report || {}).session;
      if (instance.role === "decode") column(session, rank.key, instance.name, rank.seat);
    }
  }
  for (const report of picture.told) {
    if (report.role === "decode") column(report.session, report.key, report.instance, shortSeat(report.seat));
    else rows.push({ name: report.key, instance: report.instance, seat: shortSeat(report.seat), links: report.links, out: report.out });
  }
  const own = [...picture.sessions.values()].filter((row) => row.state !== "trusted" || columns.has(row.session));
  if (own.some((row) => row.state !== "trusted") || (own.length && !rows.length)) {
    const links = new Map(own.map((row) => [row.session, { ...row, again_in_s: row.next_question_s, isOwn: true }]));
    rows.push({ name: "this registry", instance: "this registry", seat: "", links, out: [...links.values()].filter(isOut) });
  }
  for (const row of rows) for (const session of row.links.keys()) column(session);
  const byPlace = (a, b) => inOrder(a.name, b.name);
  const all = [...columns.values()].sort(columnOrder), known = all.some((each) => each.instance);
  const stray = new Set(known ? all.filter((each) => !each.instance).map((each) => each.session) : []);
  return { rows: rows.sort(byPlace), columns: all, stray };
}

/** Those that the registry knows first: a bare address is of somebody who is gone, or who never registered. */
const columnOrder = (a, b) => (a.instance === null) - (b.instance === null) || inOrder(a.name, b.name);

const isOut = (link) => link.state !== "trusted";

/** The same, one row and column an instance: each cell the worst of its ranks' links, and how many are how. */
function byInstance({ rows, columns }) {
  const group = (items) => {
    const found = new Map();
    for (const item of items) {
      const name = item.instance || item.name;
      if (!found.has(name)) found.set(name, { name, instance: name, seat: "", session: name, members: [] });
      found.get(name).members.push(item);
    }
    return [...found.values()];
  };
  const across = group(columns);
  const home = new Map(across.flatMap((each) => each.members.map((member) => [member.session, each])));
  const down = group(rows).map((each) => {
    const links = pooled(each.members, home);
    return { ...each, links, out: [...links.values()].filter(isOut) };
  });
  return { rows: down, columns: across };
}

function pooled(rows, home) {
  const cells = new Map();
  for (const row of rows) {
    for (const [session, link] of row.links) {
      const name = home.get(session).name;
      let cell = cells.get(name);
      if (!cell) cells.set(name, (cell = { session: name, state: "trusted", counts: {}, out: [] }));
      if (cell.state !== link.state) cell.state = worse(cell.state, link.state);
      cell.counts[link.state] = (cell.counts[link.state] || 0) + 1;
      if (isOut(link) && cell.out.length < 3) cell.out.push({ row, link });
    }
  }
  return cells;
}

/** Every link that is not trusted, the longest out first. */
function linksOut({ rows, columns }) {
  const names = new Map(columns.map((each) => [each.session, each.name]));
  const found = rows.flatMap((row) =>
    row.out.map((link) => ({ key: `${row.name} ${link.session}`, row, link, to: names.get(link.session) })),
  );
  return found.sort((a, b) => WORSE.indexOf(b.link.state) - WORSE.indexOf(a.link.state) || (b.link.since_s || 0) - (a.link.since_s || 0));
}

/** Rooms by side and phase, and the lists of rooms, over all reports. */
function roomsOf(picture) {
  const sides = { sender: tally(), receiver: tally() };
  const open = [], failed = [];
  for (const report of picture.told) {
    const mine = report.role === "prefill" ? sides.sender : sides.receiver;
    mine.success += (report.ended || {}).success || 0;
    mine.failed += (report.ended || {}).failed || 0;
    for (const side of Object.keys(sides))
      for (const phase of PHASES) sides[side][phase] += ((report.rooms || {})[side] || {})[phase] || 0;
    for (const room of report.open || []) open.push({ ...room, who: report.key, at: report.at - room.age_s * 1000 });
    for (const room of report.failed || []) failed.push({ ...room, who: report.key, at: report.at - room.age_s * 1000 });
  }
  open.sort((a, b) => a.at - b.at);
  failed.sort((a, b) => b.at - a.at);
  return { sides, open, failed };
}

const tally = () => ({ bootstrapping: 0, waiting_for_input: 0, transferring: 0, success: 0, failed: 0 });
const inFlight = (side) => sum(PHASES.map((phase) => side[phase]));

// --- what is wrong, worst first: what, and what to do about it

function problemsOf(picture, links, rooms, now) {
  const found = [];
  const say = (grade, what, todo, on) => found.push({ grade, what, todo, on: on || "" });
  ofTheService(picture.service, say);
  for (const instance of [...picture.instances.values()].sort((a, b) => inOrder(a.name, b.name))) ofAnInstance(instance, say);
  ofLinks(links, say);
  ofRanks(picture, say);
  ofRooms(rooms, now, say);
  const grades = ["bad", "warn", "info"];
  return found.sort((a, b) => grades.indexOf(a.grade) - grades.indexOf(b.grade));
}

function ofTheService(service, say) {
  for (const reason of service.unready || []) say("bad", `The registry is not ready: ${reason}`, "pdctl explain");
  if (service.age_s > 1)
    say("bad", `The registry answers from what it knew ${inWords(service.age_s)} ago`, "its store does not answer it: look at etcd, and at docs/replicas.md");
  for (const each of service.replicas || [])
    if (!each.answers) say("warn", `Registry ${each.url} does not tell what its ranks report: ${each.why || "not asked yet"}`, "pdctl explain");
}

function ofAnInstance(instance, say) {
  const { name } = instance;
  const missing = (instance.missing_seats || []).map((row) => shortSeat(row.seat));
  const suspects = (instance.alive_seats || []).filter((row) => row.standing === "suspect").map((row) => shortSeat(row.seat));
  if (instance.dead) say("bad", instance.health || `${name} is dead`, `start its ranks again; pdctl explain ${name}`, name);
  else if (!instance.ready)
    say("bad", `${name} cannot serve: ${instance.missing} of ${instance.seats} seats missing (${some(missing, 8)})`, `start these ranks, or find why they do not register: pdctl explain ${name}`, name);
  if (suspects.length)
    say("warn", `${name}: ${some(suspects, 8)} missed a renewal`, "the seat is lost when its lease ends: is the process stopped, or its network cut?", name);
  if (instance.draining) say("info", `${name} drains: it takes nothing new`, "it is gone when its rooms are done", name);
}

/** One sentence for a rank that all refuse, or that refuses all; else one for each decode. */
function ofLinks({ rows, columns, stray }, say) {
  const told = new Set(), n_known = columns.length - stray.size;
  for (const row of rows) {
    const out = row.out.filter((link) => !stray.has(link.session));
    if (n_known < 2 || out.length < n_known) continue;
    told.add(row.name);
    say("bad", `${row.name} refuses all ${out.length} decode ranks: ${causes(out)}`, `the fault is probably at ${row.name} itself, or in its network`, row.name);
  }
  const judges = rows.filter((row) => !told.has(row.name));
  const against = new Map();
  for (const link of judges.flatMap((row) => row.out)) against.set(link.session, [...(against.get(link.session) || []), link]);
  for (const column of columns) {
    const out = against.get(column.session);
    if (!out) continue;
    const state = out.map((link) => link.state).reduce(worse);
    const by = judges.length > 1 ? `${out.length} of ${judges.length} prefill ranks` : judges[0].name;
    if (stray.has(column.session) || out.every((link) => link.isOwn && link.state === "dropped")) {
      say("info", `${column.name} is refused by ${by}, and no registered rank has that session`, "of a rank that is gone: it is forgotten when nobody asks for it", column.name);
      continue;
    }
    const what = { trial: "is on trial at", dropped: "was dropped by", blocked: "is blocked at" }[state];
    say(state === "trial" ? "warn" : "bad", `${column.name} ${what} ${by}: ${causes(out)}`, outlook(out, state), column.name);
  }
}

function causes(links) {
  const counted = new Map();
  for (const link of links) counted.set(link.cause || link.state, (counted.get(link.cause || link.state) || 0) + 1);
  return [...counted].sort((a, b) => b[1] - a[1]).map(([cause]) => plain(cause)).slice(0, 3).join(", ");
}

function outlook(links, state) {
  if (state === "trial") return "it is trusted again after a transfer that lands";
  if (state === "dropped") return "another process is there now: it is used when it registers anew";
  return "requests to it fail at once; it is asked by itself and comes back when it answers as the same process";
}

function ofRanks(picture, say) {
  for (const report of picture.told) {
    const who = report.key;
    for (const reason of report.unready || []) say("warn", `${who} is not ready: ${reason}`, `pdctl explain ${who}`, who);
    if ((report.panicking || []).length) say("bad", `${who}: most of its links are blocked, so it uses them all the same`, "the fault is probably not at the peers: look at this rank's own network", who);
    if (report.doubt) say("warn", `${who} doubts itself: most peers fell silent at once, or its own loop was late`, "look at this host: load, network", who);
    if (report.quarantined > 0) say("info", `${who}: ${report.quarantined} pages in quarantine after a failed transfer`, "they come back by themselves when nothing can write them any more", who);
    if (report.store && !report.store.attached) say("warn", `${who} has no store: ${report.store.sentence || "not attached"}`, "pdctl store check", who);
  }
}

function ofRooms(rooms, now, say) {
  const lately = failedLately(rooms, now);
  if (!lately.length) return;
  const counted = new Map();
  for (const room of lately) counted.set(room.cause, (counted.get(room.cause) || 0) + 1);
  const [most] = [...counted].sort((a, b) => b[1] - a[1])[0];
  say("warn", `${lately.length === 1 ? "1 room" : `${lately.length} rooms`} failed in the last minute, mostly: ${plain(most)}`, `the last: ${lately[0].sentence || plain(lately[0].cause)}`, "");
}

/** Each room once, though both of its sides have told of it: in the words of the sender, who knows why. */
function failedLately(rooms, now) {
  const seen = new Map();
  for (const room of rooms.failed)
    if (now - room.at < LATELY_MS && (!seen.has(room.room) || room.side === "sender")) seen.set(room.room, room);
  return [...seen.values()];
}

// --- words

const plain = (word) => String(word || "").replaceAll("_", " ");
const some = (names, n) => names.slice(0, n).join(", ") + (names.length > n ? ` and ${names.length - n} more` : "");

function inWords(seconds) {
  if (seconds < 0.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function inBytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) { n /= 1000; unit++; }
  return `${n >= 99.5 || unit === 0 ? Math.round(n) : n.toPrecision(2)} ${units[unit]}`;
}
