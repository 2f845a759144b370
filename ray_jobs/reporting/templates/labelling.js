// Blind labels: which answer is better, with neither names nor verdicts in sight. They leave the page only as a download.
(() => {
  // The answers' ids let the import refuse a label of an answer that has been made anew since.
  const COLUMNS = ["question_id", "model_a", "model_b", "winner", "annotator", "answer_a", "answer_b"];
  const form = document.getElementById("labelling");
  const desk = document.getElementById("desk");
  const status = document.getElementById("labelled");
  const downloads = document.getElementById("downloads");
  const labels = new Map();
  let queue = [];
  let at = 0;
  let saved = 0;

  // FNV-1a with murmur's finish: an order and sides that tell nothing, and are the same in every browser.
  const hash = (text) => {
    let h = 0x811c9dc5;
    for (const letter of text) h = Math.imul(h ^ letter.codePointAt(0), 0x01000193);
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  };
  const pair = () => data.pairs[Number(form.pair.value)];
  const annotator = () => form.annotator.value.trim();
  const key = (q) => `${pair().key} ${q.question_id}`;
  const texts = (q) => [pair().model_1, pair().model_2].map((model) => (q.answers[model] ? q.answers[model].text.trim() : ""));
  // A rule settles empty and equal answers; nobody needs to read them.
  const openQuestion = (q) => texts(q).every(Boolean) && new Set(texts(q)).size === 2;
  const sides = (q) => (hash(`${q.question_id} side ${annotator()}`) & 1 ? ["b", "a"] : ["a", "b"]);

  const label = (q, winner) => {
    const [a, b] = [pair().model_1, pair().model_2];
    const answers = { answer_a: q.answers[a].answer_id, answer_b: q.answers[b].answer_id };
    labels.set(key(q), { question_id: q.question_id, model_a: a, model_b: b, winner, annotator: annotator(), ...answers });
    at += 1;
    show();
  };
  const choice = (text, shortcut, act) => {
    const button = element("button", "", `${text} `);
    button.type = "button";
    button.append(element("kbd", "", shortcut));
    button.dataset.shortcut = shortcut;
    button.addEventListener("click", act);
    return button;
  };
  const column = (title, text, language) => {
    const box = element("div", "tie");
    box.append(element("h4", "", title), prose(text, language));
    return box;
  };

  const show = () => {
    const done = queue.filter((q) => labels.has(key(q))).length;
    status.textContent = `${done} of ${queue.length} labelled`;
    downloads.hidden = labels.size === 0;
    const q = queue[at];
    const choices = element("div", "filters");
    if (!q) {
      choices.append(choice("Back", "b", () => { at = Math.max(0, at - 1); show(); }), choice("Stop and show the report", "x", stop));
      desk.replaceChildren(element("p", "asked", "That was the last question."), choices);
      return;
    }
    const [left, right] = sides(q);
    const given = { a: texts(q)[0], b: texts(q)[1] };
    const question = prose(q.question, q.language);
    question.className = "prose asked";
    const answers = element("div", "answers");
    answers.append(column("Left", given[left], q.language), column("Right", given[right], q.language));
    choices.append(
      choice("Left is better", "1", () => label(q, left)), choice("Tie", "0", () => label(q, "tie")),
      choice("Right is better", "2", () => label(q, right)), choice("Skip", "s", () => { at += 1; show(); }),
      choice("Back", "b", () => { at = Math.max(0, at - 1); show(); }), choice("Stop and show the report", "x", stop));
    desk.replaceChildren(question, ...sampleAnswer(q), answers, choices);
    desk.focus({ preventScroll: true });
    document.getElementById("labels").scrollIntoView();
  };
  // Everything else on the page tells who won, so it is out of sight until the labelling stops.
  const blind = (on) => {
    document.body.classList.toggle("blind", on);
    desk.hidden = !on;
    form.hidden = on;
  };
  const stop = () => { blind(false); document.getElementById("labels").scrollIntoView(); };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    queue = data.questions.filter((q) => openQuestion(q) && (!form.language.value || q.language === form.language.value));
    queue.sort((p, q) => hash(p.question_id) - hash(q.question_id));
    at = queue.findIndex((q) => !labels.has(key(q)));
    if (at < 0) at = queue.length;
    blind(true);
    show();
  });
  document.addEventListener("keydown", (event) => {
    if (desk.hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    desk.querySelector(`[data-shortcut="${CSS.escape(event.key)}"]`)?.click();
  });

  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const FORMATS = {
    csv: (rows) => [COLUMNS, ...rows.map((row) => COLUMNS.map((column) => quoted(row[column])))].map((cells) => cells.join(",") + "\r\n").join(""),
    jsonl: (rows) => rows.map((row) => JSON.stringify(row) + "\n").join(""),
  };
  downloads.addEventListener("click", (event) => {
    const format = event.target.dataset.format;
    if (!format) return;
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([FORMATS[format]([...labels.values()])], { type: "text/plain" }));
    link.download = `human_labels.${format}`;
    link.click();
    URL.revokeObjectURL(link.href);
    saved = labels.size;
  });
  window.addEventListener("beforeunload", (event) => { if (labels.size > saved) event.preventDefault(); });
})();
