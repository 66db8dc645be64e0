# docker buildx bake -f docker/docker-bake.hcl [train|serve|all], with LOCK and SERVE_LOCK set to the locks' digests, and REVISION and
# VERSION for the labels. `make image` builds without this file.
variable "REVISION" { default = "unknown" }
variable "VERSION" { default = "unknown" }
variable "LOCK" { default = "" }
variable "SERVE_LOCK" { default = "" }
variable "BASE_IMAGE" { default = "" }
variable "LLAMA" { default = "cuda" }
variable "JOBS" { default = "4" }
variable "PLATFORMS" { default = "linux/arm64" }

group "default" { targets = ["train"] }
group "all" { targets = ["train", "serve"] }

target "_common" {
  context    = "."
  dockerfile = "docker/Dockerfile"
  platforms  = split(",", PLATFORMS)
  args = {
    REVISION   = REVISION
    VERSION    = VERSION
    BASE_IMAGE = BASE_IMAGE != "" ? BASE_IMAGE : null # null: the digest that the Dockerfile pins
  }
}

target "train" {
  inherits = ["_common"]
  target   = "runtime"
  tags     = ["sparkproof:local"]
  args     = { LOCK = LOCK, LLAMA = LLAMA, JOBS = JOBS }
}

target "serve" {
  inherits = ["_common"]
  target   = "serve"
  tags     = ["sparkproof:serve"]
  args     = { SERVE_LOCK = SERVE_LOCK }
}
