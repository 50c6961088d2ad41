import { render } from "preact";
import { App } from "./app";
import { watchRoute, route, parsed } from "./route";
import { takeToken } from "./store";

takeToken();
route.value = parsed(location.hash);
watchRoute();
const root = document.getElementById("app");
if (root) {
  root.replaceChildren();
  render(<App />, root);
}
addEventListener("hashchange", () => {
  if (/[#&]token=/.test(location.hash)) {
    takeToken();
    route.value = parsed(location.hash);
  }
});
