// What the parts of the page share: its data, and elements made of text. Text from models only ever becomes textContent.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

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

const sampleAnswer = (q) => {
  const sample = element("div", "sample");
  sample.append(prose(q.reference, q.language));
  return [element("h4", "", "Sample answer"), sample];
};
