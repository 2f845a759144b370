// The browsable table of questions. Text from models only ever becomes textContent.
"use strict";
(() => {
  const PAGE = 50;
  const WORDS = { tie: "tie", unscored: "not scored" };
  const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("entries");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let matching = [];
  let shown = 0;

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const figure = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));

  // Marks that are invisible or turn the reading direction are written out, so that nobody is misled by them.
  const prose = (text, language) => {
    const node = element("p", "prose");
    node.dir = "auto";
    if (language) node.lang = language;
    let end = 0;
    for (const found of text.matchAll(CONTROLS)) {
      node.append(text.slice(end, found.index));
      node.append(element("span", "control", "U+" + found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")));
      end = found.index + found[0].length;
    }
    node.append(text.slice(end));
    return node;
  };

  const winnerOf = (pair, winner) => (winner === "1" ? pair.model_1 : winner === "2" ? pair.model_2 : winner);
  const badge = (pair, winner) => {
    const who = winnerOf(pair, winner);
    return element("span", `name ${who}`, WORDS[who] || data.models[who]);
  };
  const apart = (judged, met) => judged.winner !== met.cos_winner && "12".includes(judged.winner) && "12".includes(met.cos_winner);

  const view = () => {
    const pair = data.pairs[Number(form.pair.value)] || data.pairs[0];
    const judge = form.judge.value;
    return { pair, judge, met: (q) => q.met[pair.key], judged: (q) => q.met[pair.key].judged[judge] || { winner: "unscored", explanation: "" } };
  };

  const haystacks = data.questions.map((q) => {
    const answers = Object.values(q.answers).map((a) => a.text);
    const reasons = Object.values(q.met).flatMap((m) => Object.values(m.judged).map((j) => j.explanation));
    return [q.question, q.reference, q.topic, ...answers, ...reasons].join("\n").toLocaleLowerCase();
  });

  const select = (now) => {
    const words = form.search.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const wants = (field, value) => !form[field].value || form[field].value === value;
    return data.questions.filter((q, i) =>
      wants("topic", q.topic) && wants("language", q.language) &&
      wants("judged", now.judged(q).winner) && wants("cosine", now.met(q).cos_winner) &&
      (!form.apart.checked || apart(now.judged(q), now.met(q))) &&
      words.every((word) => haystacks[i].includes(word)));
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

  const body = (q, now) => {
    const met = now.met(q);
    const node = element("div", "body");
    node.append(element("h4", "", "Sample answer"));
    const sample = element("div", "sample");
    sample.append(prose(q.reference, q.language));
    node.append(sample);
    const answers = element("div", "answers");
    for (const [side, model] of [["1", now.pair.model_1], ["2", now.pair.model_2]]) {
      const won = [now.judged(q).winner === side ? "the judge" : "", met.cos_winner === side ? "similarity" : ""].filter(Boolean);
      answers.append(answer(q, side, model, won));
    }
    node.append(answers);
    const reasons = element("div", "reasons");
    for (const [name, judged] of Object.entries(met.judged)) {
      const title = element("h4", "", `What the ${name} judge says: `);
      title.append(badge(now.pair, judged.winner));
      reasons.append(title, prose(judged.explanation || "No explanation given."));
      if (judged.note) reasons.append(element("p", "note", judged.note));
    }
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
      document.getElementById("head-" + heads).textContent = heads === "judge" ? now.judge ? `${now.judge} judge prefers` : "Judge prefers" : "Similarity prefers";
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
    if (typing(event.target)) return;
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
  document.querySelectorAll("[data-contradictions]").forEach((button) => button.addEventListener("click", () => {
    form.reset();
    form.pair.value = button.dataset.pair;
    form.judge.value = button.dataset.contradictions;
    form.apart.checked = true;
    form.order.value = "widest";
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
  window.addEventListener("beforeprint", () => {
    before = { shown, open: new Set(entries().filter((node) => node.open).map((node) => node.id)) };
    show(matching.length);
    entries().forEach((node) => node.fill());
  });
  window.addEventListener("afterprint", () => {
    if (!before) return;
    entries().slice(before.shown).forEach((node) => node.remove());
    shown = before.shown;
    entries().forEach((node) => { node.open = before.open.has(node.id); });
    show(shown);
  });
  refresh();
  openLinked();
})();
