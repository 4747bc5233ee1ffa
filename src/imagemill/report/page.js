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

// A list of images is one stop of the Tab key: the image that arrow keys moved to, or its first one.
const imagesIn = (list) => [...list.querySelectorAll("img")].filter((image) => !image.closest("li").hidden);
const setStop = (list, stop) => {
  const images = imagesIn(list);
  stop ??= images.find((image) => image.tabIndex === 0) ?? images[0];
  for (const image of list.querySelectorAll("img")) image.tabIndex = image === stop ? 0 : -1;
};

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
      setStop(part.querySelector(".images"));
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
  if (name.dataset.source) name.insertAdjacentText("beforeend", ` in ${name.dataset.source}`);
  copy.textContent = "Copy path";
  large.showModal();
};
for (const list of document.querySelectorAll("main .images, main .examples")) {
  for (const image of list.querySelectorAll("img")) {
    image.setAttribute("role", "button");
    image.addEventListener("click", () => enlarge(image));
    image.addEventListener("keydown", (event) => {
      const images = imagesIn(list), at = images.indexOf(image);
      const isAbove = (one, other) => one.offsetLeft === other.offsetLeft && one.offsetTop < other.offsetTop;
      const goal = {
        ArrowRight: images[at + 1], ArrowLeft: images[at - 1], Home: images[0], End: images.at(-1),
        ArrowDown: images.find((other) => isAbove(image, other)), ArrowUp: images.findLast((other) => isAbove(other, image)),
      }[event.key];
      if (event.key === "Enter" || event.key === " ") enlarge(image);
      else if (goal) { setStop(list, goal); goal.focus(); }
      else return;
      event.preventDefault();
    });
  }
  setStop(list);
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

const markWide = () => { for (const region of document.querySelectorAll("div.scroll[role]")) region.toggleAttribute("data-wide", region.scrollWidth > region.clientWidth + 1); };
addEventListener("resize", markWide);
document.addEventListener("toggle", markWide, true);
markWide();
