"use strict";
// The same for every job: whatever it shows is in the document already, as text.
const byId = (id) => document.getElementById(id);

const theme = byId("theme");
try { theme.value = localStorage.getItem("imagemill-theme") || ""; } catch { /* a page from disk may have no storage */ }
const dress = () => {
  document.documentElement.dataset.theme = theme.value;
  try { localStorage.setItem("imagemill-theme", theme.value); } catch { /* then it is forgotten */ }
};
theme.addEventListener("change", dress);
dress();
byId("appearance").hidden = false;
document.documentElement.dataset.scripted = "";

const filter = byId("filter");
if (filter) {
  const text = byId("text"), chosenClass = byId("class"), chosenPart = byId("part");
  const parts = [...document.querySelectorAll(".part")].map((part) => ({
    part,
    images: [...part.querySelectorAll(".images > li")].map((item) => ({ item, words: [...item.querySelectorAll(".answer, .name, .kept")].map((line) => line.textContent).join("\n").toLowerCase() })),
  }));
  const total = parts.reduce((sum, { images }) => sum + images.length, 0);
  const apply = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const { part, images } of parts) {
      const isChosen = !chosenPart?.value || part.id === chosenPart.value;
      let here = 0;
      for (const { item, words } of images) {
        const fits = isChosen && (!chosenClass.value || item.dataset.class === chosenClass.value) && words.includes(wanted);
        item.hidden = !fits;
        here += fits;
      }
      part.hidden = !here;
      shown += here;
    }
    byId("shown").textContent = `${shown} of ${total} images shown`;
  };
  text.addEventListener("input", apply);
  chosenClass.addEventListener("change", apply);
  chosenPart?.addEventListener("change", apply);
  const choose = (classId) => {
    text.value = "";
    chosenClass.value = classId;
    if (chosenPart) chosenPart.value = "";
    apply();
  };
  byId("clear").addEventListener("click", () => { choose(""); text.focus(); });
  for (const link of document.querySelectorAll("[data-pick]")) link.addEventListener("click", () => choose(link.dataset.pick));
  filter.hidden = false;
  apply();
}

const large = byId("large"), content = byId("content"), copy = byId("copy");
const enlarge = (image) => {
  content.replaceChildren(...image.parentElement.cloneNode(true).childNodes);
  const shown = content.querySelector("img"), name = content.querySelector(".name");
  for (const attribute of ["role", "tabindex"]) shown.removeAttribute(attribute);
  if (name.title) name.insertAdjacentText("beforeend", ` in ${name.title}`);
  copy.textContent = "Copy path";
  large.showModal();
};
for (const image of document.querySelectorAll("main img")) {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => enlarge(image));
  image.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    enlarge(image);
  });
}
copy.addEventListener("click", async () => {
  const path = content.querySelector(".name bdi");
  try {
    await navigator.clipboard.writeText(path.textContent);
    copy.textContent = "Copied";
  } catch { // not allowed: select it for the reader
    getSelection().selectAllChildren(path);
    copy.textContent = "Selected: press Ctrl-C";
  }
});
byId("close").addEventListener("click", () => large.close());
large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll(".provenance")) part.open = true; });
