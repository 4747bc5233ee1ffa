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

const filter = byId("filter");
if (filter) {
  const text = byId("text"), chosenClass = byId("class"), chosenPart = byId("part");
  const parts = [...document.querySelectorAll(".part")].map((part) => ({
    part,
    images: [...part.querySelectorAll(".images > li")].map((item) => ({ item, words: item.textContent.toLowerCase() })),
  }));
  const total = parts.reduce((sum, { images }) => sum + images.length, 0);
  const apply = () => {
    const wanted = text.value.trim().toLowerCase();
    let shown = 0;
    for (const { part, images } of parts) {
      const isChosen = !chosenPart.value || part.id === chosenPart.value;
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
  chosenPart.addEventListener("change", apply);
  byId("clear").addEventListener("click", () => {
    text.value = chosenClass.value = chosenPart.value = "";
    apply();
    text.focus();
  });
  filter.hidden = false;
  apply();
}
