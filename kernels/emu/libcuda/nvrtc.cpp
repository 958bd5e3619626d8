// A libnvrtc that compiles nothing: its images are what the libcuda beside this file accepts. It checks what it is asked for.
//
//   FAKE_NVRTC_FAIL=rmsnorm.cu    that file does not compile
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

enum : int { SUCCESS = 0, INVALID_INPUT = 3, INVALID_OPTION = 5, COMPILATION = 6 };

struct Program {
    std::string name, source, log, image;
    std::map<std::string, std::string> headers;
};

// The first quoted include of `text` that is not among the headers, looked for in those that are, too.
std::string missing_header(const Program &program, const std::string &text) {
    for (size_t at = 0; (at = text.find("\n#include \"", at)) != std::string::npos; at++) {
        const size_t begin = at + strlen("\n#include \"");
        const std::string name = text.substr(begin, text.find('"', begin) - begin);
        auto header = program.headers.find(name);
        // The emulator's header is for g++ alone.
        if (name == "cuda_on_cpu.h") continue;
        if (header == program.headers.end()) return name;
        const std::string deeper = missing_header(program, header->second);
        if (!deeper.empty()) return deeper;
    }
    return "";
}

int copy_out(char *out, const std::string &text) {
    memcpy(out, text.data(), text.size());
    return SUCCESS;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) int

EXPORT nvrtcVersion(int *major, int *minor) {
    *major = 12;
    *minor = 4;
    return SUCCESS;
}
EXPORT nvrtcGetNumSupportedArchs(int *count) {
    *count = 3;
    return SUCCESS;
}
EXPORT nvrtcGetSupportedArchs(int *archs) {
    archs[0] = 80;
    archs[1] = 89;
    archs[2] = 90;
    return SUCCESS;
}
extern "C" __attribute__((visibility("default"))) const char *nvrtcGetErrorString(int code) {
    return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR";
}
EXPORT nvrtcCreateProgram(Program **out, const char *source, const char *name, int count, const char *const *headers,
                          const char *const *names) {
    if (!source || !name) return INVALID_INPUT;
    *out = new Program{name, source, "", "", {}};
    for (int i = 0; i < count; i++) (*out)->headers[names[i]] = headers[i];
    return SUCCESS;
}
EXPORT nvrtcCompileProgram(Program *program, int count, const char *const *options) {
    std::string arch;
    bool standard = false;
    for (int i = 0; i < count; i++) {
        const std::string option = options[i], prefix = "--gpu-architecture=sm_";
        if (option.compare(0, prefix.size(), prefix) == 0) arch = option.substr(prefix.size());
        standard |= option == "--std=c++17";
    }
    if (arch.empty() || !standard) return INVALID_OPTION;
    const std::string missing = missing_header(*program, "\n" + program->source);
    if (!missing.empty()) program->log = "no header " + missing;
    const char *fail = getenv("FAKE_NVRTC_FAIL");
    if (fail && program->name == fail) program->log = "rmsnorm.cu(1): error: the fake compiler says so";
    if (!program->log.empty()) return COMPILATION;
    program->image = "FAKE " + arch + " " + program->name;
    return SUCCESS;
}
EXPORT nvrtcDestroyProgram(Program **program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}
EXPORT nvrtcGetProgramLogSize(Program *program, size_t *size) {
    *size = program->log.size() + 1;
    return SUCCESS;
}
EXPORT nvrtcGetProgramLog(Program *program, char *log) {
    copy_out(log, program->log);
    log[program->log.size()] = 0;
    return SUCCESS;
}
EXPORT nvrtcGetCUBINSize(Program *program, size_t *size) {
    *size = program->image.size();
    return SUCCESS;
}
EXPORT nvrtcGetCUBIN(Program *program, char *image) { return copy_out(image, program->image); }
