// The browsable table of questions: rows are made when they come into sight, so that 10,000 open as fast as 100.
(() => {
  const PAGE = 50;
  const WORDS = { tie: "tie", unscored: "not scored" };
  const MOST_PRINTED = 500;
  const form = document.getElementById("filters");
  const list = document.getElementById("entries");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let matching = [];
  let shown = 0;

  // [who judges, as the subject of a sentence; the verb's ending]
  const WHO = { human: ["people", ""], jury: ["the jury", "s"] };
  const who = (name) => WHO[name] || [`the ${name} judge`, "s"];
  const figure = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  const winnerOf = (pair, winner) => (winner === "1" ? pair.model_1 : winner === "2" ? pair.model_2 : winner);
  const badge = (pair, winner) => {
    const who = winnerOf(pair, winner);
    return element("span", `name ${who}`, WORDS[who] || data.models[who]);
  };
  const opposite = (one, other) => one !== other && "12".includes(one) && "12".includes(other);
  const apart = (judged, met) => opposite(judged.winner, met.cos_winner);
  const UNSCORED = { winner: "unscored", consistent: true, said: [] };
  const DISAGREEMENTS = {
    "": () => true,
    similarity: apart,
    judges: (judged, met) => Object.values(met.judged).some((other) => opposite(judged.winner, other.winner)),
    orders: (judged) => !judged.consistent,
  };

  const view = () => {
    const pair = data.pairs[Number(form.pair.value)] || data.pairs[0];
    const judge = form.judge.value;
    return { pair, judge, met: (q) => q.met[pair.key], judged: (q) => q.met[pair.key].judged[judge] || UNSCORED };
  };

  // Made by the first search alone: they double what the page holds in memory.
  const haystacks = [];
  const haystack = (q, i) => {
    if (haystacks[i] === undefined) {
      const answers = Object.values(q.answers).map((a) => a.text);
      const reasons = Object.values(q.met).flatMap((m) => Object.values(m.judged).flatMap((j) => j.said.map((opinion) => opinion.text)));
      haystacks[i] = [q.question, q.reference, q.topic, ...answers, ...reasons].join("\n").normalize().toLocaleLowerCase();
    }
    return haystacks[i];
  };

  const select = (now) => {
    const words = form.search.value.normalize().toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const wants = (field, value) => !form[field].value || form[field].value === value;
    return data.questions.filter((q, i) =>
      wants("topic", q.topic) && wants("language", q.language) &&
      wants("judged", now.judged(q).winner) && wants("cosine", now.met(q).cos_winner) &&
      DISAGREEMENTS[form.apart.value](now.judged(q), now.met(q)) &&
      words.every((word) => haystack(q, i).includes(word)));
  };
  const width = (q, now) => Math.abs(now.met(q).margin ?? -1);
  const ORDERS = {
    asked: () => 0,
    widest: (now) => (a, b) => width(b, now) - width(a, now),
    closest: (now) => (a, b) => width(a, now) - width(b, now),
  };

  const heading = (q, now, node) => {
    const met = now.met(q);
    const judged = now.judged(q);
    const asked = element("span", "asked");
    const question = element("bdi", "", q.question);
    question.lang = q.language;
    asked.append(question, element("span", "tags", [q.topic.replaceAll("_", " "), q.language].filter(Boolean).join(" · ")));
    const judge = element("span", "says");
    judge.append(element("span", "by", "Judge: "), badge(now.pair, judged.winner));
    const cosine = element("span", "says");
    cosine.append(element("span", "by", "Similarity: "), badge(now.pair, met.cos_winner));
    if (met.margin !== null) cosine.append(element("span", "margin", ` by ${Math.abs(met.margin).toFixed(4)}`));
    if (apart(judged, met)) cosine.append(element("span", "apart", "contradicts the judge"));
    node.append(element("span", "ordinal", String(q.ordinal)), asked, judge, cosine);
  };

  const answer = (q, side, model, won) => {
    const given = q.answers[model];
    const box = element("div", model);
    const title = element("h4", "name " + model, `Answer ${side}: ${data.models[model]}`);
    if (won.length) title.append(element("span", "won", `preferred by ${won.join(" and ")}`));
    box.append(title);
    if (!given) { box.append(element("p", "note", "No answer.")); return box; }
    box.append(given.text ? prose(given.text, q.language) : element("p", "note", given.error || "Empty answer."));
    const ended = { stop: "", length: ", cut at the limit", error: ", failed" }[given.finish_reason] ?? "";
    const scores = given.cosine === undefined ? [] : [
      given.cosine === null ? `no similarity (${given.reason || "no reason given"})` : `cosine ${figure(given.cosine, 6)}`,
      `SIF cosine ${figure(given.sif_cosine, 3)}`, `token F1 ${figure(given.token_f1, 3)}`,
      `words without a vector ${figure(100 * given.oov_share, 0)} %`];
    box.append(element("p", "scores", [...scores, `${given.completion_tokens} tokens${ended}`].join(" · ")));
    return box;
  };

  const ORDER_WORDS = { 1: "with answer 1 read first", 2: "with answer 2 read first" };
  const readFirst = (first, hasOrders) => {
    const orders = [...new Set(first)];
    if (!hasOrders) return "";
    const times = first.length > orders.length ? `, ${first.length} times` : "";
    return (orders.length === 2 ? "in both orders" : ORDER_WORDS[orders[0]]) + times;
  };
  // What one judge says of one question: one column for each different opinion, as orders and repeats brought them.
  const opinions = (pair, name, judged) => {
    const [subject, ending] = who(name);
    const title = element("h4", "", `What ${subject} say${ending}: `);
    title.append(badge(pair, judged.winner));
    const columns = element("div", judged.said.length > 1 ? "opinions" : "opinion");
    // People, a jury and imports are heard once: no answer was read first.
    const hasOrders = judged.said.some((opinion) => opinion.first.includes(2));
    for (const opinion of judged.said) {
      const box = element("div");
      const head = element("p", "scores");
      head.append(badge(pair, opinion.winner), ` ${readFirst(opinion.first, hasOrders)}`);
      box.append(head, prose(opinion.text || "No explanation given."));
      columns.append(box);
    }
    const note = element("p", "note", "Its verdicts differ, so they count as a tie.");
    return judged.consistent ? [title, columns] : [title, columns, note];
  };

  const body = (q, now) => {
    const met = now.met(q);
    const node = element("div", "body");
    node.append(...sampleAnswer(q));
    const answers = element("div", "answers");
    for (const [side, model] of [["1", now.pair.model_1], ["2", now.pair.model_2]]) {
      const won = [now.judged(q).winner === side ? "the judge" : "", met.cos_winner === side ? "similarity" : ""].filter(Boolean);
      answers.append(answer(q, side, model, won));
    }
    node.append(answers);
    const reasons = element("div", "reasons");
    for (const [name, judged] of Object.entries(met.judged)) reasons.append(...opinions(now.pair, name, judged));
    node.append(reasons);
    return node;
  };

  const entry = (q, now) => {
    const node = element("details", "entry");
    node.id = "q-" + q.question_id;
    const summary = element("summary");
    heading(q, now, summary);
    node.append(summary);
    const fill = () => { if (node.open && node.children.length === 1) node.append(body(q, now)); };
    node.addEventListener("toggle", fill);
    node.fill = () => { node.open = true; fill(); };
    return node;
  };

  const show = (upTo) => {
    const now = view();
    list.append(...matching.slice(shown, upTo).map((q) => entry(q, now)));
    shown = Math.min(upTo, matching.length);
    more.hidden = shown === matching.length;
    more.textContent = `Show ${Math.min(PAGE, matching.length - shown)} more`;
    count.textContent = `${matching.length} of ${data.questions.length} questions` + (more.hidden ? "" : `, the first ${shown} shown`);
  };
  const refresh = () => {
    const now = view();
    const order = ORDERS[form.order.value](now);
    matching = select(now);
    if (order) matching.sort(order);
    for (const [field, heads] of [["judged", "judge"], ["cosine", "similarity"]]) {
      form[field].options[1].textContent = data.models[now.pair.model_1];
      form[field].options[2].textContent = data.models[now.pair.model_2];
      const [subject, ending] = heads === "similarity" ? ["similarity", "s"] : now.judge ? who(now.judge) : ["judge", "s"];
      document.getElementById("head-" + heads).textContent = `${subject} prefer${ending}`;
    }
    list.replaceChildren();
    shown = 0;
    show(PAGE);
  };

  const entries = () => [...list.children];
  const move = (step) => {
    const all = entries();
    const at = all.findIndex((node) => node.contains(document.activeElement));
    const next = all[Math.min(Math.max(at + step, 0), all.length - 1)];
    if (next) next.firstElementChild.focus();
  };
  const typing = (target) => /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && event.target === form.search) { form.search.value = ""; refresh(); return; }
    if (typing(event.target) || document.body.classList.contains("blind")) return;
    if (event.key === "/") { event.preventDefault(); form.search.focus(); }
    if (event.key === "j") move(1);
    if (event.key === "k") move(-1);
  });

  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refresh, 60); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(refresh));
  more.addEventListener("click", () => {
    const first = shown;
    show(shown + PAGE);
    entries()[first]?.firstElementChild.focus();
  });
  // A button of the page, as the count in a 2x2 table, sets the filters that it names.
  document.querySelectorAll("button[data-pair]").forEach((button) => button.addEventListener("click", () => {
    form.reset();
    for (const [field, value] of Object.entries(button.dataset)) form[field].value = value;
    setTimeout(() => { refresh(); document.getElementById("questions").scrollIntoView(); });
  }));

  const openLinked = () => {
    const id = decodeURIComponent(location.hash.slice(1));
    const at = matching.findIndex((q) => "q-" + q.question_id === id);
    if (at < 0) return;
    if (at >= shown) show(at + 1);
    const node = document.getElementById(id);
    node.fill();
    node.scrollIntoView();
  };
  window.addEventListener("hashchange", openLinked);
  let before = null;
  // The settings stay folded: they are long, and stand in report.json.
  const folded = () => [...document.querySelectorAll("main section:not(#made) details:not(.entry):not([open])")];
  window.addEventListener("beforeprint", () => {
    before = { shown, open: new Set(entries().filter((node) => node.open).map((node) => node.id)), folded: folded() };
    before.folded.forEach((node) => { node.open = true; });
    show(Math.max(shown, Math.min(matching.length, MOST_PRINTED)));
    entries().forEach((node) => node.fill());
    if (shown < matching.length) count.textContent += `; a print stops there: filter, or take comparisons.csv`;
  });
  window.addEventListener("afterprint", () => {
    if (!before) return;
    before.folded.forEach((node) => { node.open = false; });
    entries().slice(before.shown).forEach((node) => node.remove());
    shown = before.shown;
    entries().forEach((node) => { node.open = before.open.has(node.id); });
    show(shown);
  });
  refresh();
  openLinked();
})();
