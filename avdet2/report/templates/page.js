// Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"use strict";
(() => {
  document.body.classList.add("with-script");
  const FILE = "clusters.json";
  const content = JSON.parse(document.getElementById("content").textContent);
  const cards = new Map([...document.querySelectorAll(".cluster")].map((card) => [+card.dataset.id, card]));
  const save = document.getElementById("save");
  const status = document.getElementById("status");
  // The server of tools/report.py writes into the run; from disk the file is downloaded.
  let served = false;
  let changed = false;

  const field = (card) => card.querySelector(".name input");
  const box = (card) => card.querySelector(".keep input");

  function say(text, wrong = false) {
    status.textContent = text;
    status.classList.toggle("wrong", wrong);
  }

  // Everything else on the page that shows a cluster's name.
  const mentions = new Map(content.clusters.map((entry) => [entry.id, []]));
  for (const element of document.querySelectorAll("[data-name]")) mentions.get(+element.dataset.name).push(element);
  const tags = new Map(content.clusters.map((entry) => [entry.id, []]));
  for (const tag of document.querySelectorAll(".box[data-cluster] .tag")) tags.get(+tag.parentNode.dataset.cluster).push(tag);

  function read(entry) {
    const card = cards.get(entry.id);
    entry.name = field(card).value.trim();
    entry.keep = box(card).checked;
    field(card).classList.toggle("wrong", !entry.name);
    card.classList.toggle("dropped", !entry.keep);
    for (const element of mentions.get(entry.id)) element.textContent = entry.name;
    for (const tag of tags.get(entry.id)) tag.textContent = `${entry.name} ${tag.textContent.match(/\d+ %$/)[0]}`;
  }

  // Which clusters have one name.
  function merge() {
    const names = new Map();
    for (const entry of content.clusters) {
      if (entry.keep && entry.name) names.set(entry.name, [...(names.get(entry.name) || []), entry.id]);
    }
    for (const entry of content.clusters) {
      const others = (entry.keep && names.get(entry.name) || []).filter((id) => id !== entry.id);
      const note = cards.get(entry.id).querySelector(".merged");
      note.hidden = !others.length;
      note.textContent = others.length ? `one class with cluster ${others.join(", ")}` : "";
    }
    const options = [...names.keys()].sort().map((name) => new Option(name, name));
    document.getElementById("known").replaceChildren(...options);
  }

  function problem() {
    const nameless = content.clusters.find((entry) => !entry.name);
    if (nameless) return `Cluster ${nameless.id} has no name`;
    return content.clusters.some((entry) => entry.keep) ? "" : "No cluster is kept";
  }

  function edited(entry) {
    changed = true;
    read(entry);
    merge();
    save.disabled = Boolean(problem());
    say(problem() || "Not saved yet", Boolean(problem()));
  }

  function fill(entries) {
    for (const entry of entries) {
      const card = cards.get(entry.id);
      if (!card) continue;
      field(card).value = entry.name;
      box(card).checked = entry.keep !== false;
    }
    content.clusters.forEach(read);
    merge();
  }

  async function store() {
    const text = `${JSON.stringify(content, null, 1)}\n`;
    if (served) {
      const answer = await fetch(FILE, { method: "PUT", body: text, headers: { "Content-Type": "application/json" } });
      if (!answer.ok) throw new Error(await answer.text());
      say(`Saved: ${await answer.text()}`);
    } else {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      link.download = FILE;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      say(`Put ${FILE} into the run's folder`);
    }
    changed = false;
    save.disabled = true;
  }

  save.addEventListener("click", () => store().catch((error) => say(`Not saved: ${error.message}`, true)));
  for (const entry of content.clusters) {
    const card = cards.get(entry.id);
    field(card).addEventListener("input", () => edited(entry));
    box(card).addEventListener("change", () => edited(entry));
    // Enter goes to the next name.
    field(card).addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      const fields = [...document.querySelectorAll(".name input")].filter((input) => input.offsetParent);
      const next = fields[fields.indexOf(event.target) + 1];
      if (next) next.select();
    });
  }
  window.addEventListener("beforeunload", (event) => {
    if (changed) event.preventDefault();
  });

  for (const input of document.querySelectorAll("[data-show]")) {
    const toggle = () => document.body.classList.toggle(`show-${input.dataset.show}`, input.checked);
    input.addEventListener("change", toggle);
    // A reloaded page keeps its ticks.
    toggle();
  }
  const score = document.getElementById("score");
  if (score) {
    const boxes = [...document.querySelectorAll("#clusters .box.found")];
    const others = [...document.querySelectorAll("#failures .box.found")];
    const frames = document.querySelectorAll("#clusters .frame").length;
    const toggle = () => {
      for (const found of [...boxes, ...others]) found.hidden = +found.dataset.score < +score.value;
      const count = boxes.filter((found) => !found.hidden).length;
      document.getElementById("above").textContent = `${score.value}: ${count} boxes on ${frames} frames`;
    };
    score.addEventListener("input", toggle);
    toggle();
  }
  const filter = document.getElementById("doubtful");
  if (filter) {
    const toggle = () => document.body.classList.toggle("only-doubtful", filter.checked);
    filter.addEventListener("change", toggle);
    toggle();
  }

  for (const clip of document.querySelectorAll(".clip")) {
    const [button, audio, bar] = [".play", "audio", ".progress"].map((name) => clip.querySelector(name));
    if (!audio) continue;
    const show = () => {
      button.setAttribute("aria-pressed", String(!audio.paused));
      bar.style.transform = `scaleX(${audio.paused || !audio.duration ? 0 : audio.currentTime / audio.duration})`;
    };
    button.addEventListener("click", () => {
      if (!audio.paused) return audio.pause();
      for (const other of document.querySelectorAll("audio")) other.pause();
      audio.currentTime = 0;
      audio.play().catch((error) => say(`This sound does not play: ${error.message}`, true));
    });
    for (const event of ["play", "pause", "timeupdate", "ended"]) audio.addEventListener(event, show);
  }

  fill(content.clusters);
  if (location.protocol.startsWith("http")) {
    fetch(FILE).then(async (answer) => {
      if (!answer.ok) return;
      served = true;
      fill((await answer.json()).clusters);
    });
  }
})();
