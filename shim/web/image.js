/** The first frame: the file that the user chose, made smaller if it is large, and stored with POST /images. */

import { ApiError, json } from "./api.js";

const MAX_SIDE = 2048; // pixels; no video is larger than 1920
const MAX_BYTES = 4_000_000;
const KINDS = ["image/jpeg", "image/png", "image/webp"];
const QUALITY = 0.92;

/** Store the file. Resolves to the value of the field `image`; throws ApiError. */
export async function upload(file) {
  const body = await shrunk(file);
  const stored = await json("images", { method: "POST", headers: { "Content-Type": body.type }, body, patient: true });
  return stored.image;
}

/** The file as it is, if it is small enough; otherwise a JPEG with at most MAX_SIDE pixels to a side. */
async function shrunk(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new ApiError(`image: ${file.name} is not a picture that this browser can read`, { code: "INVALID_REQUEST" });
  });
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_BYTES && KINDS.includes(file.type)) return file;
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/jpeg", QUALITY); });
}
