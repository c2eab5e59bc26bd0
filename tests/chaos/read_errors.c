/* A disk or a network file system that refuses to be read, for the tests: preloaded into processes (LD_PRELOAD), it lets
   calls that read fail while a control file says so.

   READ_ERRORS names the control file. Its lines are "ERRNO WHO WHAT PATTERN": the error's number; ranks, others or all
   (RANK in the environment makes a rank); list (directories), open, read, stat, or any; fnmatch's pattern of the path,
   in which * also matches a slash. Each call that failed is a line "PID CALL PATH" in the control file's name plus
   ".hits". Calls that write are left alone, and so is memory that was mapped before. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CONTROL_BYTES 4096
#define PATH_BYTES (2 * PATH_MAX)

/* Past the wrappers below. */
static int open_directly(const char *path, int flags) {
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0644);
}

/* The control file's text; 0 if nothing is to fail now. */
static int read_control(char *text) {
    const char *path = getenv("READ_ERRORS");
    int fd = path ? open_directly(path, O_RDONLY) : -1;
    long size;
    if (fd < 0) return 0;
    size = syscall(SYS_read, fd, text, CONTROL_BYTES - 1);
    syscall(SYS_close, fd);
    if (size <= 0) return 0;
    text[size] = 0;
    return 1;
}

static void note(const char *call, const char *path) {
    char name[PATH_BYTES], line[PATH_BYTES];
    int fd, length;
    snprintf(name, sizeof name, "%s.hits", getenv("READ_ERRORS"));
    fd = open_directly(name, O_WRONLY | O_CREAT | O_APPEND);
    if (fd < 0) return;
    length = snprintf(line, sizeof line, "%d %s %.*s\n", (int)getpid(), call, PATH_MAX, path);
    syscall(SYS_write, fd, line, (size_t)length);
    syscall(SYS_close, fd);
}

/* The path of an open file or directory. */
static int path_of(int fd, char *path) {
    char link[64];
    long length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return 1;
}

static int full_path(int directory, const char *name, char *path) {
    char parent[PATH_MAX];
    if (name[0] == '/') {
        snprintf(path, PATH_BYTES, "%s", name);
    } else if (directory == AT_FDCWD) {
        if (syscall(SYS_getcwd, parent, sizeof parent) <= 0) return 0;
        snprintf(path, PATH_BYTES, "%s/%s", parent, name);
    } else {
        if (!path_of(directory, parent)) return 0;
        snprintf(path, PATH_BYTES, "%s/%s", parent, name);
    }
    return 1;
}

/* The error that a call must end with; 0 if none. Leaves errno as it is. */
static int planned(const char *call, int directory, const char *name) {
    char text[CONTROL_BYTES], path[PATH_BYTES], *line, *rest;
    int before = errno, found = 0;
    if (read_control(text) && (name ? full_path(directory, name, path) : path_of(directory, path))) {
        for (line = strtok_r(text, "\n", &rest); line && !found; line = strtok_r(NULL, "\n", &rest)) {
            char who[16], what[16], pattern[PATH_MAX];
            int error;
            if (sscanf(line, "%d %15s %15s %4095[^\n]", &error, who, what, pattern) != 4) continue;
            if (strcmp(who, "all") && strcmp(who, getenv("RANK") ? "ranks" : "others")) continue;
            if (strcmp(what, "any") && strcmp(what, call)) continue;
            if (fnmatch(pattern, path, 0) == 0) found = error;
        }
        if (found) note(call, path);
    }
    errno = before;
    return found;
}

#define FAIL_IF_PLANNED(failed, call, directory, name) \
    do { \
        int error_ = planned(call, directory, name); \
        if (error_) { errno = error_; return failed; } \
    } while (0)

/* `real`: the function of this name that would have been called. */
#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define MODE(mode, flags) \
    do { \
        if ((flags) & (O_CREAT | __O_TMPFILE)) { \
            va_list more_; \
            va_start(more_, flags); \
            mode = va_arg(more_, mode_t); \
            va_end(more_); \
        } \
    } while (0)

#define OPENING(directory, path, flags) \
    do { \
        if (((flags) & O_ACCMODE) != O_WRONLY) \
            FAIL_IF_PLANNED(-1, (flags) & O_DIRECTORY ? "list" : "open", directory, path); \
    } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        mode_t mode = 0; \
        REAL(int, name, const char *, int, ...); \
        MODE(mode, flags); \
        OPENING(AT_FDCWD, path, flags); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        mode_t mode = 0; \
        REAL(int, name, int, const char *, int, ...); \
        MODE(mode, flags); \
        OPENING(directory, path, flags); \
        return real(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        if (mode[0] == 'r') FAIL_IF_PLANNED(NULL, "open", AT_FDCWD, path); \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    FAIL_IF_PLANNED(NULL, "list", AT_FDCWD, path);
    return real(path);
}

DIR *fdopendir(int fd) {
    REAL(DIR *, fdopendir, int);
    FAIL_IF_PLANNED(NULL, "list", fd, NULL);
    return real(fd);
}

ssize_t read(int fd, void *buffer, size_t size) {
    REAL(ssize_t, read, int, void *, size_t);
    FAIL_IF_PLANNED(-1, "read", fd, NULL);
    return real(fd, buffer, size);
}

#define PREAD(name) \
    ssize_t name(int fd, void *buffer, size_t size, off_t offset) { \
        REAL(ssize_t, name, int, void *, size_t, off_t); \
        FAIL_IF_PLANNED(-1, "read", fd, NULL); \
        return real(fd, buffer, size, offset); \
    }
PREAD(pread)
PREAD(pread64)

#define STAT(name, type) \
    int name(const char *path, struct type *found) { \
        REAL(int, name, const char *, struct type *); \
        FAIL_IF_PLANNED(-1, "stat", AT_FDCWD, path); \
        return real(path, found); \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTATAT(name, type) \
    int name(int directory, const char *path, struct type *found, int flags) { \
        REAL(int, name, int, const char *, struct type *, int); \
        if (path[0]) FAIL_IF_PLANNED(-1, "stat", directory, path); \
        return real(directory, path, found, flags); \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int directory, const char *path, int flags, unsigned mask, struct statx *found) {
    REAL(int, statx, int, const char *, int, unsigned, struct statx *);
    if (path[0]) FAIL_IF_PLANNED(-1, "stat", directory, path);
    return real(directory, path, flags, mask, found);
}
